"""Faults of topics, and limits of the brokers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from streamworker.kafka.topics import (
    TopicAdmin,
    TopicFacts,
    batch_notes_of,
    faults_of,
    read_metadata_limit,
    single_partition_notes_of,
)
from tests.unit.kafka.fakes import settings


@pytest.mark.parametrize("policy", ["compact", "compact,delete"])
def test_compacted_topic_is_reported_except_for_control_and_results_topic(policy: str) -> None:
    """Compaction removes jobs and events of a key that has newer ones."""
    set_ = settings(topics__results="results")
    topics = set_.topics
    facts: dict[str, TopicFacts | None] = {
        name: TopicFacts(1, 1, None, policy)
        for name in (topics.jobs[0], topics.events, topics.dlq, topics.control, topics.results)
    }

    faults = faults_of(set_, facts)

    assert [fault.split()[1] for fault in faults] == [topics.jobs[0], topics.events, topics.dlq]
    assert all("set cleanup.policy=delete" in fault for fault in faults)


def test_results_topic_that_is_too_small_is_reported() -> None:
    """Its records may have `kafka.max_result_bytes`."""
    set_ = settings(topics__results="results", kafka__max_result_bytes="8000000")

    [fault] = faults_of(set_, {"results": TopicFacts(1, 1, 1_048_588, "compact,delete")})

    assert fault.startswith("topic results accepts records of 1048588 bytes, 8001024 are needed")


HOUR_MS = 3_600_000


@pytest.mark.parametrize(
    ("retention_ms", "is_short"),
    [(None, False), (-1, False), (0, True), (HOUR_MS, True), (24 * HOUR_MS - 1, True), (24 * HOUR_MS, False)],
)
def test_topic_that_forgets_within_a_day_is_noted_for_batches(
    retention_ms: int | None, is_short: bool
) -> None:
    """A batch that is interrupted for longer cannot tell which of its lines were paid for."""
    set_ = settings(topics__results="results")
    facts = TopicFacts(1, 1, None, "delete", retention_ms)

    notes = batch_notes_of(set_, {set_.topics.jobs[0]: facts, "results": facts})

    assert [note.split()[1] for note in notes] == ([set_.topics.jobs[0], "results"] if is_short else [])


def test_retention_of_the_topics_that_batches_read_is_noted() -> None:
    """Those of other topics do not matter; without a results topic a batch reads the events."""
    set_ = settings(topics__jobs="chat,batch", topics__batch="batch")
    facts = TopicFacts(1, 1, None, "delete", HOUR_MS)
    names = ("chat", "batch", set_.topics.events, set_.topics.dlq)

    notes = batch_notes_of(set_, dict.fromkeys(names, facts))

    assert [note.split()[1] for note in notes] == ["batch", set_.topics.events]
    assert "keeps records for 1 h" in notes[0]
    assert batch_notes_of(set_, dict.fromkeys(names)) == []


class Admin:
    """Two brokers; their configuration is readable if `limits` are given."""

    def __init__(self, *limits: str) -> None:
        self._limits = limits

    async def describe_cluster(self) -> dict[str, Any]:
        return {"brokers": [{"node_id": 1}, {"node_id": 2}]}

    async def describe_configs(self, resources: list[Any]) -> list[Any]:
        [resource] = resources
        if not self._limits:
            return [SimpleNamespace(resources=[(29, "no permission", 4, resource.name, [])])]
        entry = ("offset.metadata.max.bytes", self._limits[int(resource.name) - 1])
        return [SimpleNamespace(resources=[(0, None, 4, resource.name, [entry])])]


@pytest.mark.parametrize(("limits", "limit"), [((), 4096), (("4096", "512"), 512), (("8192", "8192"), 8192)])
async def test_metadata_limit_is_the_smallest_of_the_brokers(limits: tuple[str, ...], limit: int) -> None:
    """Kafka's default counts where the configuration is not readable."""
    admin: Any = Admin(*limits)

    assert await read_metadata_limit(admin) == limit


@pytest.mark.parametrize(
    ("limits", "is_reported"), [((), False), (("4096", "80"), True), (("4096", "4096"), False)]
)
async def test_metadata_limit_below_kafkas_default_is_reported_by_check(
    limits: tuple[str, ...], *, is_reported: bool
) -> None:
    """With the limit and the broker's setting; such a group accepts fewer jobs at once."""
    admin: Any = Admin(*limits)
    line = await TopicAdmin(settings(), admin).small_metadata_limit()

    assert (line is not None) is is_reported
    if line is not None:
        assert line.startswith("the brokers accept 80 bytes of offset metadata, 4096 are Kafka's default")
        assert "Raise offset.metadata.max.bytes, or add partitions" in line


@pytest.mark.parametrize(("partitions", "is_noted"), [(1, True), (2, False), (None, False)])
def test_job_topic_with_one_partition_is_noted(partitions: int | None, *, is_noted: bool) -> None:
    """A second worker would wait. The number of partitions of the other topics does not matter to workers."""
    set_ = settings(topics__jobs="chat,batch")
    facts = None if partitions is None else TopicFacts(partitions, 1, None)
    described: dict[str, TopicFacts | None] = {
        "chat": TopicFacts(12, 1, None),
        "batch": facts,
        set_.topics.events: facts,
    }

    notes = single_partition_notes_of(set_, described)

    assert [note.split()[1] for note in notes] == (["batch"] if is_noted else [])
    assert all("--alter --topic batch --partitions N" in note for note in notes)
