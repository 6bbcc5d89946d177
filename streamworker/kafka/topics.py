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

__all__ = [
    "FRAMING_BYTES",
    "METADATA_LIMIT",
    "TopicAdmin",
    "TopicFacts",
    "batch_notes_of",
    "faults_of",
    "open_admin",
    "read_metadata_limit",
]

FRAMING_BYTES = 1024
"""Upper bound for what surrounds a record: batch header, record framing and the worker's headers."""

_DEFAULT_MESSAGE_BYTES = 1_048_588

METADATA_LIMIT = 4096
"""Kafka's default for `offset.metadata.max.bytes`."""


_DAY_MS = 86_400_000

RESULTS_CLEANUP = {
    "cleanup.policy": "compact,delete",
    "retention.ms": str(7 * _DAY_MS),
    "segment.ms": str(_DAY_MS),
    "min.compaction.lag.ms": str(_DAY_MS),
}
"""Of a results topic: a result is kept for a week; a tombstone deletes it within two days and a cleaner's run."""


BATCHES_CLEANUP = {"cleanup.policy": "compact", "min.compaction.lag.ms": "0"}
"""Of the state of batches: the last record of each file and batch is kept until it is deleted."""


class TopicFacts(NamedTuple):
    """Properties of a topic. All but the first two are None if the broker does not report them; -1 ms is unlimited."""

    partitions: int
    replicas: int
    max_message_bytes: int | None
    cleanup_policy: str | None = None
    retention_ms: int | None = None


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
        names = [*topics.jobs, topics.events, topics.control, topics.dlq, *topics.allowed_reply_to]
        names += [name for name in (topics.results, topics.batches) if name]
        return list(dict.fromkeys(names))

    def _configuration(self, name: str) -> dict[str, str]:
        """Return the topic's configuration: `max.message.bytes`, if our records can exceed Kafka's default, and cleanup."""
        needed = _needed_bytes(self._settings, name)
        limit = {"max.message.bytes": str(needed)} if needed > _DEFAULT_MESSAGE_BYTES else {}
        topics = self._settings.topics
        if name == topics.batches:
            return limit | BATCHES_CLEANUP
        return limit | RESULTS_CLEANUP if name == topics.results else limit

    async def _facts(self, name: str, partitions: list[dict[str, Any]]) -> TopicFacts:
        replicas = min((len(partition["replicas"]) for partition in partitions), default=0)
        names = ["max.message.bytes", "cleanup.policy", "retention.ms"]
        with translate_errors(f"reading the configuration of topic {name}"):
            values = await read_configuration(self._admin, ConfigResourceType.TOPIC, name, names)
        limit, retention = values.get("max.message.bytes"), values.get("retention.ms")
        return TopicFacts(
            len(partitions),
            replicas,
            int(limit) if limit else None,
            values.get("cleanup.policy"),
            int(retention) if retention else None,
        )

    async def small_metadata_limit(self) -> str | None:
        """Return a line if the brokers' `offset.metadata.max.bytes` is below Kafka's default; None otherwise."""
        with translate_errors("reading the configuration of the brokers"):
            limit = await read_metadata_limit(self._admin)
        if limit >= METADATA_LIMIT:
            return None
        return (
            f"the brokers accept {limit} bytes of offset metadata, {METADATA_LIMIT} are Kafka's default: fewer jobs of a "
            "partition can end before an older one. Raise offset.metadata.max.bytes, or add partitions"
        )


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


async def read_configuration(
    admin: Admin, kind: ConfigResourceType, name: str, names: list[str]
) -> dict[str, str]:
    """Return the values of a topic's or broker's settings; empty without the permission. Raises aiokafka's KafkaError."""
    resource = ConfigResource(kind, name, dict.fromkeys(names))
    for response in await admin.describe_configs([resource]):
        for error_code, _, _, _, entries in response.resources:
            if not error_code:
                return {entry[0]: entry[1] for entry in entries if entry[1] is not None}
    return {}


async def read_metadata_limit(admin: Admin) -> int:
    """Return the smallest `offset.metadata.max.bytes` of the brokers; Kafka's default where it is not readable."""
    setting = "offset.metadata.max.bytes"
    limits = [METADATA_LIMIT]
    for broker in (await admin.describe_cluster())["brokers"]:
        values = await read_configuration(admin, ConfigResourceType.BROKER, str(broker["node_id"]), [setting])
        limits += [int(value) for name, value in values.items() if name == setting]
    return min(limits) if len(limits) == 1 else min(limits[1:])


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
                "max.message.bytes, or lower kafka.max_record_bytes (events), worker.max_job_bytes (dead letters) or "
                "kafka.max_result_bytes (results)"
            )
        may_be_compacted = {settings.topics.control, settings.topics.results, settings.topics.batches}
        if name == settings.topics.batches and facts.cleanup_policy not in {None, "compact"}:
            faults.append(
                f"topic {name} has cleanup.policy={facts.cleanup_policy}, which deletes the state of files and batches: "
                "set cleanup.policy=compact"
            )
        if "compact" in (facts.cleanup_policy or "") and name not in may_be_compacted:
            faults.append(
                f"topic {name} has cleanup.policy={facts.cleanup_policy}, which removes records of a key that has newer "
                "ones: set cleanup.policy=delete"
            )
    return faults


def batch_notes_of(settings: Settings, topics: dict[str, TopicFacts | None]) -> list[str]:
    """Return one line for each topic whose records may be deleted before a batch of one day has ended.

    An interrupted batch reads its jobs and its results again: without them it is unknown whether a line was paid for.
    """
    names = settings.topics
    notes = []
    for name in dict.fromkeys([names.batch or names.jobs[0], names.results or names.events]):
        facts = topics.get(name)
        if facts is None or facts.retention_ms is None or not 0 <= facts.retention_ms < _DAY_MS:
            continue
        hours = f"{facts.retention_ms / 3_600_000:.3g} h"
        notes.append(
            f"topic {name} keeps records for {hours}: a batch that takes longer, or is interrupted for longer, cannot "
            "find its lines again. Raise its retention.ms above the time of the longest batch"
        )
    return notes


def single_partition_notes_of(settings: Settings, topics: dict[str, TopicFacts | None]) -> list[str]:
    """Return one line for each job topic with one partition, which a second worker cannot share."""
    return [
        f"topic {name} has 1 partition, so one worker runs all of its jobs and any other one waits: add partitions with "
        f"kafka-topics.sh --alter --topic {name} --partitions N"
        for name in settings.topics.jobs
        if (facts := topics.get(name)) is not None and facts.partitions == 1
    ]


def _needed_bytes(settings: Settings, name: str) -> int:
    topics = settings.topics
    if name == topics.events or name in topics.allowed_reply_to:
        return settings.kafka.max_record_bytes + FRAMING_BYTES
    if name == topics.results:
        return settings.kafka.max_result_bytes + FRAMING_BYTES
    if name == topics.dlq:
        return settings.worker.max_job_bytes + 4 * FRAMING_BYTES
    return 0


def _refusal(topic: str, code: int, message: str | None) -> str | None:
    error = for_code(code)
    if error in {NoError, TopicAlreadyExistsError}:
        return None
    return f"{topic}: {message or describe_error(error())}"
