"""Settings for each listener of the secured Kafka, and the ACLs of the tests' user."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiokafka.protocol.admin import CreateAclsRequest, DeleteAclsRequest

from tests.brokers.security import USER, unsigned_token

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from streamworker.kafka.acls import Acl
    from tests.brokers.apache import ApacheKafka

__all__ = ["Acls", "way_in"]

RESOURCES = {"TOPIC": 2, "GROUP": 3, "TRANSACTIONAL_ID": 5}
OPERATIONS = {"READ": 3, "WRITE": 4}
PATTERNS = {False: 3, True: 4}
ALLOW = 3


def _entry(acl: Acl) -> tuple[int, str, int, str, str, int, int]:
    """Return the fields that both requests have for an ACL."""
    kind, pattern, operation = (
        RESOURCES[acl.resource],
        PATTERNS[acl.is_prefix],
        OPERATIONS[acl.operation],
    )
    return (kind, acl.name, pattern, f"User:{USER}", "*", operation, ALLOW)


class Acls:
    """Adds and removes ACLs of the tests' user, as `kafka-acls.sh` does."""

    def __init__(self, admin: Any) -> None:
        self._client = admin._client

    async def give(self, acls: Iterable[Acl]) -> None:
        for acl in acls:
            answer = await self._client.send(self._client.get_random_node(), CreateAclsRequest(*_entry(acl)))
            assert [code for code, _ in answer.creation_responses] == [0], answer

    async def take(self, acl: Acl) -> None:
        answer = await self._client.send(self._client.get_random_node(), DeleteAclsRequest(*_entry(acl)))
        [(code, _, matching)] = answer.filter_responses
        assert code == 0, answer
        assert len(matching) == 1, answer


def way_in(kafka: ApacheKafka, mechanism: str, directory: Path) -> dict[str, str]:
    """Return settings for one of the secured listeners, as environment variables without the prefix."""
    credentials = kafka.credentials
    sasl = {
        "KAFKA__BOOTSTRAP_SERVERS": f"127.0.0.1:{kafka.sasl_port}",
        "KAFKA__SECURITY_PROTOCOL": "SASL_SSL",
        "KAFKA__SASL_MECHANISM": mechanism,
        "KAFKA__SSL_CAFILE": str(credentials.authorities),
    }
    if mechanism == "mTLS":
        return {
            "KAFKA__BOOTSTRAP_SERVERS": f"127.0.0.1:{kafka.mtls_port}",
            "KAFKA__SECURITY_PROTOCOL": "SSL",
            "KAFKA__SSL_CAFILE": str(credentials.authorities),
            "KAFKA__SSL_CERTFILE": str(credentials.certificate),
            "KAFKA__SSL_KEYFILE": str(credentials.key),
        }
    secret = directory / "secret"
    if mechanism == "OAUTHBEARER":
        secret.write_text(unsigned_token())
        return sasl | {"KAFKA__SASL_OAUTH_TOKEN_FILE": str(secret)}
    secret.write_text(credentials.password)
    return sasl | {"KAFKA__SASL_USERNAME": USER, "KAFKA__SASL_PASSWORD_FILE": str(secret)}
