"""Describe, check and create the topics that the settings name."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from aiokafka.admin import NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import NoError, TopicAlreadyExistsError, TopicAuthorizationFailedError, for_code
from aiokafka.protocol.metadata import MetadataRequest

from streamworker.errors import KafkaRefused
from streamworker.kafka.acls import RequiredAcls, missing_acls, worker_acls
from streamworker.kafka.clients import Admin, new_admin
from streamworker.kafka.compat import client_of
from streamworker.kafka.errors import describe_error, translate_errors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.config import Settings
    from streamworker.kafka.acls import Acl

__all__ = ["FRAMING_BYTES", "TopicAdmin", "TopicFacts", "faults_of", "open_admin"]

FRAMING_BYTES = 1024
"""Upper bound for what surrounds a record: batch header, record framing and the worker's headers."""

_DEFAULT_MESSAGE_BYTES = 1_048_588


class TopicFacts(NamedTuple):
    """Properties of a topic. `max_message_bytes` is None if the broker does not report it."""

    partitions: int
    replicas: int
    max_message_bytes: int | None


class TopicAdmin:
    """Describes, creates and deletes topics. All methods raise KafkaError."""

    def __init__(self, settings: Settings, admin: Admin) -> None:
        self._settings = settings
        self._admin = admin
        self._acls = RequiredAcls.of_worker(settings)

    async def describe(self) -> dict[str, TopicFacts | None]:
        """Return the properties of every topic that the settings name; None for a topic that does not exist.

        Raises KafkaRefused for topics that we may not describe: the broker leaves them out of its list.
        """
        with translate_errors("listing topics"):  # all of them: asking for one by name may create it
            listed = {topic["topic"]: topic["partitions"] for topic in await self._admin.describe_topics()}
            hidden = await self._hidden([name for name in self._names() if name not in listed])
        if hidden:
            refusals = [describe_error(TopicAuthorizationFailedError(name), self._acls) for name in hidden]
            raise KafkaRefused("; ".join(refusals))
        return {
            name: await self._facts(name, listed[name]) if name in listed else None for name in self._names()
        }

    async def missing_acls(self) -> list[str]:
        """Return one line for each ACL that a worker needs and the broker does not grant, with the command to add it."""
        needed: list[Acl] = worker_acls(self._settings)
        with translate_errors("reading the authorized operations"):
            missing = await missing_acls(client_of(self._admin), self._settings, needed)
        return self._acls.describe_missing(missing)

    async def _hidden(self, names: list[str]) -> list[str]:
        """Return those of the topics that exist or may exist and that we may not describe."""
        if not names:
            return []
        client = client_of(self._admin)
        request = MetadataRequest(names, allow_auto_topic_creation=False)
        answer = await client.send(client.get_random_node(), request)
        return [name for code, name, *_ in answer.topics if for_code(code) is TopicAuthorizationFailedError]

    async def create(self, *, partitions: int, replicas: int | None = None) -> list[str]:
        """Create the topics that do not exist; return their names.

        The default for `replicas` is three, or the number of brokers if that is smaller.
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
        """Delete the topics that the settings name, for example after a demo."""
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
        """Return the topic's configuration: `max.message.bytes`, if our records can exceed Kafka's default."""
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
    """Connect an admin client. Raises KafkaError, ConfigurationError."""
    admin = new_admin(settings.kafka)
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
    """Return one line for each topic that does not suit the settings, with what to do."""
    faults = []
    for name, facts in topics.items():
        if facts is None:
            faults.append(f"topic {name} does not exist: create it with `streamworker topics create`")
            continue
        needed = _needed_bytes(settings, name)
        if facts.max_message_bytes is not None and facts.max_message_bytes < needed:
            faults.append(
                f"topic {name} accepts records of {facts.max_message_bytes} bytes, {needed} are needed: raise its "
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
