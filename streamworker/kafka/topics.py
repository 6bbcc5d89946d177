"""The topics that the worker needs: what they are like, what is wrong with them, and their creation."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import NoError, TopicAlreadyExistsError, for_code

from streamworker.errors import KafkaRefused
from streamworker.kafka.acls import acl_command, missing_acls, principal_of, worker_acls
from streamworker.kafka.connection import client_arguments, install_client
from streamworker.kafka.errors import describe_error, translate_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.config import Settings

__all__ = ["FRAMING_BYTES", "TopicAdmin", "TopicFacts", "faults_of", "open_admin"]

FRAMING_BYTES = 1024
"""What Kafka adds around a record, generously: batch header, record framing, our headers."""

_DEFAULT_MESSAGE_BYTES = 1_048_588


class TopicFacts(NamedTuple):
    """What a topic is like. `max_message_bytes` is None where the broker does not say."""

    partitions: int
    replicas: int
    max_message_bytes: int | None


class TopicAdmin:
    """Looks at topics and creates them."""

    def __init__(self, settings: Settings, admin: Any) -> None:
        self._settings = settings
        self._admin = admin

    async def describe(self) -> dict[str, TopicFacts | None]:
        """Return the facts of every topic that the settings name; None for one that does not exist.

        All topics are listed and none is asked for by name: that would create it on a broker with auto-creation.
        """
        with translate_errors("listing topics"):
            listed = {topic["topic"]: topic["partitions"] for topic in await self._admin.describe_topics()}
        return {
            name: await self._facts(name, listed[name]) if name in listed else None for name in self._names()
        }

    async def missing_acls(self) -> list[str]:
        """Return which rights of a worker the broker does not give us, one line each with what to do."""
        with translate_errors("asking the broker what we are allowed to do"):
            missing = await missing_acls(self._admin._client, self._settings, worker_acls(self._settings))  # noqa: SLF001
        principal = principal_of(self._settings.kafka)
        return [
            f"{principal} lacks {acl}, to {acl.purpose}: {acl_command(acl, principal)}" for acl in missing
        ]

    async def create(self, *, partitions: int, replicas: int | None = None) -> list[str]:
        """Create the topics that do not exist; return their names. Raises KafkaRefused.

        Without `replicas` there are three of each, or as many as there are brokers.
        """
        missing = [name for name, facts in (await self.describe()).items() if facts is None]
        if not missing:
            return []
        copies = replicas or min(3, await self._brokers())
        new = [
            NewTopic(name, partitions, copies, topic_configs=self._configuration(name)) for name in missing
        ]
        with translate_errors("creating topics"):
            response = await self._admin.create_topics(new)
        refusals = [refusal for error in response.topic_errors if (refusal := _refusal(*error[:3]))]
        if refusals:
            raise KafkaRefused("creating topics: " + "; ".join(refusals))
        return missing

    async def delete(self) -> None:
        """Delete the topics that the settings name. For what was made for a while only, such as a demo's."""
        with translate_errors("deleting topics"):
            await self._admin.delete_topics(
                [name for name, facts in (await self.describe()).items() if facts]
            )

    async def _brokers(self) -> int:
        with translate_errors("asking for the brokers"):
            return len((await self._admin.describe_cluster())["brokers"])

    def _names(self) -> list[str]:
        topics = self._settings.topics
        return list(
            dict.fromkeys([*topics.jobs, topics.events, topics.control, topics.dlq, *topics.allowed_reply_to])
        )

    def _configuration(self, name: str) -> dict[str, str]:
        """A dead letter is the job record with headers, so its topic takes somewhat more than the job topics."""
        needed = _needed_bytes(self._settings, name)
        return {"max.message.bytes": str(needed)} if needed > _DEFAULT_MESSAGE_BYTES else {}

    async def _facts(self, name: str, partitions: list[dict[str, Any]]) -> TopicFacts:
        replicas = min((len(partition["replicas"]) for partition in partitions), default=0)
        return TopicFacts(len(partitions), replicas, await self._max_message_bytes(name))

    async def _max_message_bytes(self, name: str) -> int | None:
        resource = ConfigResource(ConfigResourceType.TOPIC, name, {"max.message.bytes": None})
        with translate_errors(f"reading the configuration of topic {name}"):
            responses = await self._admin.describe_configs([resource])
        for response in responses:
            for error_code, _, _, _, entries in response.resources:
                values = {entry[0]: entry[1] for entry in entries}
                if not error_code and (value := values.get("max.message.bytes")):
                    return int(value)
        return None


@asynccontextmanager
async def open_admin(settings: Settings) -> AsyncIterator[TopicAdmin]:
    """Connect an admin client. Raises KafkaError."""
    admin = AIOKafkaAdminClient(**client_arguments(settings.kafka))
    install_client(admin._client, settings.kafka)  # noqa: SLF001 - it has no public name
    with translate_errors(f"connecting to {settings.kafka.bootstrap_servers}"):
        try:
            await admin.start()
        except BaseException:
            await admin.close()
            raise
    try:
        yield TopicAdmin(settings, admin)
    finally:
        await admin.close()


def faults_of(settings: Settings, topics: dict[str, TopicFacts | None]) -> list[str]:
    """Return what is wrong with the topics for these settings, one line each with what to do."""
    faults = []
    for name, facts in topics.items():
        if facts is None:
            faults.append(f"topic {name} does not exist: create it with `streamworker topics create`")
            continue
        needed = _needed_bytes(settings, name)
        if facts.max_message_bytes is not None and facts.max_message_bytes < needed:
            faults.append(
                f"topic {name} takes records of {facts.max_message_bytes} bytes, {needed} are needed: raise its "
                "max.message.bytes, or lower kafka.max_record_bytes (events) or worker.max_job_bytes (dead letters)"
            )
    return faults


def _needed_bytes(settings: Settings, name: str) -> int:
    topics = settings.topics
    if name == topics.events or name in topics.allowed_reply_to:
        return settings.kafka.max_record_bytes + FRAMING_BYTES
    if name == topics.dlq:
        return settings.worker.max_job_bytes + 4 * FRAMING_BYTES
    return 0


def _refusal(topic: str, code: int, message: str | None) -> str | None:
    error = for_code(code)
    if error in {NoError, TopicAlreadyExistsError}:
        return None
    return f"{topic}: {message or describe_error(error())}"
