"""The ACLs that each command needs, and which of them are missing.

`streamworker check` asks the broker for the operations that our principal may perform (KIP-430) and reports every missing ACL
at once. A running worker reports a missing ACL when the broker refuses a request for it. Both use the same sentence.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

from aiokafka.client import CoordinationType
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    GroupCoordinatorNotAvailableError,
    IncompatibleBrokerVersion,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
    for_code,
)
from aiokafka.protocol.transaction import AddOffsetsToTxnRequest

from streamworker.kafka.acl_requests import AuthorizedGroupRequest, AuthorizedTopicsRequest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamworker.config import KafkaSettings, Settings

__all__ = [
    "COMMANDS",
    "Acl",
    "RequiredAcls",
    "acl_command",
    "gateway_acls",
    "missing_acls",
    "principal_of",
    "transactional_id",
    "worker_acls",
]

_BITS = {"READ": 3, "WRITE": 4}  # codes of AclOperation; the broker's answer has one bit for each
_UNKNOWN = -(1 << 31)  # KIP-430: the broker does not report authorized operations
_BACKOFF_S = (0.1, 0.2, 0.3, 0.5, 1, 2)
_OPTIONS = {"TOPIC": "--topic", "GROUP": "--group", "TRANSACTIONAL_ID": "--transactional-id"}


class Acl(NamedTuple):
    """One operation on one resource, or on all resources with a name prefix. READ and WRITE both imply DESCRIBE."""

    operation: str
    resource: str
    name: str
    purpose: str
    is_prefix: bool = False

    def __str__(self) -> str:
        kind = self.resource.lower().replace("_", " ")
        named = f"all {kind}s that begin with {self.name}" if self.is_prefix else f"{kind} {self.name}"
        return f"{self.operation} on {named}"


def worker_acls(settings: Settings) -> list[Acl]:
    """Return the ACLs that `streamworker run` needs, and no others."""
    topics, group = settings.topics, settings.worker.group_id
    acls = [Acl("READ", "TOPIC", name, "read jobs") for name in topics.jobs]
    acls += [Acl("READ", "GROUP", group, "join the consumer group and commit offsets")]
    events = dict.fromkeys([topics.events, *topics.allowed_reply_to])
    acls += [Acl("WRITE", "TOPIC", name, "publish events") for name in events]
    acls += [Acl("WRITE", "TOPIC", topics.dlq, "write dead letters")]
    if topics.results:
        acls += [Acl("WRITE", "TOPIC", topics.results, "write results")]
    acls += [Acl("READ", "TOPIC", topics.control, "read cancellations")]
    if settings.worker.delivery == "exactly_once":
        purpose = "commit exactly once, with one transactional id per partition of the job topics"
        acls += [Acl("WRITE", "TRANSACTIONAL_ID", f"{group}.", purpose, is_prefix=True)]
    return acls


def _submit_acls(settings: Settings) -> list[Acl]:
    return [Acl("WRITE", "TOPIC", name, "write jobs") for name in settings.topics.jobs]


def _tail_acls(settings: Settings) -> list[Acl]:
    events = dict.fromkeys([settings.topics.events, *settings.topics.allowed_reply_to])
    return [Acl("READ", "TOPIC", name, "read events") for name in events]


def _audit_acls(settings: Settings) -> list[Acl]:
    results = settings.topics.results
    reads = [Acl("READ", "TOPIC", results, "compare results with events")] if results else []
    return [*_tail_acls(settings), *reads]


def _cancel_acls(settings: Settings) -> list[Acl]:
    return [Acl("WRITE", "TOPIC", settings.topics.control, "write cancellations")]


def _client_acls(settings: Settings) -> list[Acl]:
    results = settings.topics.results
    reads = [Acl("READ", "TOPIC", results, "read results")] if results else []
    return [*_submit_acls(settings), *_tail_acls(settings), *reads, *_cancel_acls(settings)]


def _dlq_acls(settings: Settings) -> list[Acl]:
    return [Acl("READ", "TOPIC", settings.topics.dlq, "read dead letters"), *_submit_acls(settings)]


def _retry_acls(settings: Settings) -> list[Acl]:
    reads = [Acl("READ", "TOPIC", name, "read the jobs to submit again") for name in settings.topics.jobs]
    return [*_tail_acls(settings), *reads, *_submit_acls(settings)]


def _batch_acls(settings: Settings) -> list[Acl]:
    topics = settings.topics
    jobs = topics.batch or topics.jobs[0]
    acls = [
        Acl("WRITE", "TOPIC", jobs, "submit lines"),
        Acl("READ", "TOPIC", jobs, "find the lines that an earlier start has submitted"),
    ]
    if topics.results:
        acls += [Acl("READ", "TOPIC", topics.results, "read results")]
    acls += [
        Acl(
            "READ",
            "TOPIC",
            topics.events,
            "read events: results without a completion, and whether jobs start",
        )
    ]
    acls += [Acl("WRITE", "TOPIC", topics.control, "cancel lines")]
    if settings.worker.delivery == "exactly_once":
        purpose = "fence other processes of a run, with one transactional id per run"
        acls += [Acl("WRITE", "TRANSACTIONAL_ID", "streamworker-batch.", purpose, is_prefix=True)]
    return acls


def gateway_acls(settings: Settings) -> list[Acl]:
    """Return the ACLs of `streamworker gateway`."""
    topics = settings.topics
    acls = [
        Acl("WRITE", "TOPIC", settings.gateway.topic or topics.jobs[0], "write jobs"),
        Acl("READ", "TOPIC", topics.events, "read events"),
        Acl("WRITE", "TOPIC", topics.control, "write cancellations"),
    ]
    if not (topics.batches and topics.results):
        return acls
    acls += [
        Acl("READ", "TOPIC", topics.batches, "read the state of files and batches"),
        Acl("WRITE", "TOPIC", topics.batches, "write the state of files and batches"),
        Acl("READ", "GROUP", settings.batch.group_id, "divide the batches among the gateways"),
    ]
    unique: dict[tuple[str, str, str], Acl] = {}
    for acl in [*acls, *_batch_acls(settings)]:
        unique.setdefault(acl[:3], acl)
    return list(unique.values())


COMMANDS = {
    "run, check": worker_acls,
    "submit": _submit_acls,
    "tail": _tail_acls,
    "audit": _audit_acls,
    "cancel": _cancel_acls,
    "retry": _retry_acls,
    "dlq": _dlq_acls,
    "batch": _batch_acls,
    "gateway": gateway_acls,
    "Python client": _client_acls,
}
"""The ACLs of each command, and of programs that use the client library.

`topics create` needs CREATE on the topics as well, which a worker does not.
"""


def transactional_id(group: str, topic: str, partition: int) -> str:
    """Return the transactional id of a job partition's committer."""
    return f"{group}.{topic}.{partition}"


def principal_of(settings: KafkaSettings) -> str:
    """Return the principal of our connections; a placeholder in <> where only the broker knows the name."""
    if settings.security_protocol.startswith("SASL"):
        return f"User:{settings.sasl_username}" if settings.sasl_username else "User:<subject of the token>"
    if settings.security_protocol == "SSL" and settings.ssl_certfile:
        return "User:<name in the client certificate>"
    return "User:ANONYMOUS"


def acl_command(acl: Acl, principal: str) -> str:
    """Return the command that adds an ACL."""
    pattern = " --resource-pattern-type prefixed" if acl.is_prefix else ""
    return (
        f"kafka-acls.sh --add --allow-principal '{principal}' --operation {acl.operation} "
        f"{_OPTIONS[acl.resource]} {acl.name}{pattern}"
    )


def _missing_acl(acl: Acl, principal: str) -> str:
    return f"{principal} lacks {acl}, to {acl.purpose}: {acl_command(acl, principal)}"


class RequiredAcls:
    """The ACLs that a command needs, to describe a request that the broker refused."""

    def __init__(self, settings: KafkaSettings, acls: Iterable[Acl]) -> None:
        self._principal = principal_of(settings)
        self._acls = tuple(acls)

    @classmethod
    def of_worker(cls, settings: Settings) -> RequiredAcls:
        """Return the ACLs of `streamworker run`."""
        return cls(settings.kafka, worker_acls(settings))

    @classmethod
    def of_gateway(cls, settings: Settings) -> RequiredAcls:
        """Return the ACLs of `streamworker gateway`."""
        return cls(settings.kafka, gateway_acls(settings))

    def describe(self, error: BaseException) -> str | None:
        """Return one sentence per ACL that the refused request needs; None for any other error."""
        missing = [acl for acl in self._acls if _concerns(error, acl)]
        return "; ".join(_missing_acl(acl, self._principal) for acl in missing) or None

    def describe_missing(self, missing: Iterable[Acl]) -> list[str]:
        """Return the sentence for each ACL."""
        return [_missing_acl(acl, self._principal) for acl in missing]


def _concerns(error: BaseException, acl: Acl) -> bool:
    """Return whether the broker refused a request that needs this ACL. The error's first argument names the resource."""
    match error:
        case TopicAuthorizationFailedError():
            return acl.resource == "TOPIC" and acl.name in _named_by(error)
        case GroupAuthorizationFailedError():
            return acl.resource == "GROUP"
        case TransactionalIdAuthorizationFailed():
            return acl.resource == "TRANSACTIONAL_ID"
        case ClusterAuthorizationFailedError():  # an idempotent producer needs WRITE on at least one topic
            return acl.resource == "TOPIC" and acl.operation == "WRITE"
    return False


def _named_by(error: BaseException) -> set[str]:
    named = error.args[0] if error.args else ()
    return {named} if isinstance(named, str) else set(named)


async def missing_acls(client: Any, settings: Settings, acls: Iterable[Acl]) -> list[Acl]:
    """Return those of `acls` that the broker does not grant. Raises aiokafka's KafkaError.

    An ACL counts as granted if the broker cannot tell: it is older than KIP-430, or the topic does not exist.
    """
    acls = list(acls)
    try:
        topics = await _topic_operations(client, [acl.name for acl in acls if acl.resource == "TOPIC"])
        group = await _group_operations(client, settings.worker.group_id)
    except (IncompatibleBrokerVersion, NotImplementedError):
        return []
    known = {("TOPIC", name): bits for name, bits in topics.items()}
    known["GROUP", settings.worker.group_id] = group
    missing = [acl for acl in acls if not _allows(known.get((acl.resource, acl.name)), acl)]
    transactions = [acl for acl in acls if acl.resource == "TRANSACTIONAL_ID"]
    return missing if not transactions or await _may_write(client, settings) else missing + transactions


def _allows(bits: int | None, acl: Acl) -> bool:
    return bits in {None, _UNKNOWN} or bool(bits & 1 << _BITS[acl.operation])


async def _topic_operations(client: Any, names: list[str]) -> dict[str, int]:
    """Return the authorized operations of each topic, one bit each; 0 for a topic that we may not describe."""
    answer = await client.send(client.get_random_node(), AuthorizedTopicsRequest(names))
    found = {}
    for error_code, name, _, _, bits in answer.topics:
        is_denied = for_code(error_code) is TopicAuthorizationFailedError
        found[name] = 0 if is_denied else _UNKNOWN if error_code else bits
    return found


async def _group_operations(client: Any, group: str) -> int:
    try:
        node = await _coordinator(client, CoordinationType.GROUP, group)
    except GroupAuthorizationFailedError:
        return 0
    [(error_code, *_, bits)] = (await client.send(node, AuthorizedGroupRequest(group))).groups
    if for_code(error_code) is GroupAuthorizationFailedError:
        return 0
    return _UNKNOWN if error_code else int(bits)


async def _coordinator(client: Any, kind: CoordinationType, name: str) -> int:
    for wait_s in _BACKOFF_S:
        try:
            return int(await client.coordinator_lookup(kind, name))
        except (
            GroupCoordinatorNotAvailableError
        ):  # a new cluster creates its coordinators at the first request
            await asyncio.sleep(wait_s)
    return int(await client.coordinator_lookup(kind, name))


async def _may_write(client: Any, settings: Settings) -> bool:
    """Send a request that cannot succeed: the producer id does not exist, but the broker checks the ACL before that."""
    name = transactional_id(settings.worker.group_id, settings.topics.jobs[0], 0)
    try:
        node = await _coordinator(client, CoordinationType.TRANSACTION, name)
    except TransactionalIdAuthorizationFailed:
        return False
    request = AddOffsetsToTxnRequest(name, -1, -1, settings.worker.group_id)
    answer = await client.send(node, request)
    return for_code(answer.error_code) is not TransactionalIdAuthorizationFailed
