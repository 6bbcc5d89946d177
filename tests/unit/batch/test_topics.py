"""A run's records in Kafka, over a log in memory: what was submitted, what was lost, and whole completions."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any, ClassVar

import msgspec
import pytest

from streamworker.batch import topics as module
from streamworker.batch.follow import EventFollower, ResultFollower
from streamworker.batch.identity import JobRef
from streamworker.batch.output import EndedJob, Place
from streamworker.batch.topics import RunTopics
from streamworker.config import Settings
from streamworker.errors import KafkaRefused, KafkaUnavailable
from streamworker.model import TopicPartition
from tests.unit.batch.logs import IDS, LogInMemory, digest, events_of, job_id

if TYPE_CHECKING:
    from collections.abc import Callable

    Make = Callable[..., tuple[RunTopics, LogInMemory]]


class Submitter:
    """Takes the place of both submitters. `made` has all of a test."""

    made: ClassVar[list[Submitter]] = []

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments[1:]
        self.opened = self.closed = 0
        self.made.append(self)

    async def open(self) -> None:
        self.opened += 1

    async def close(self) -> None:
        self.closed += 1

    async def submit(self, records: list[tuple[bytes, bytes]]) -> dict[int, int]:
        return {1: 10 + len(records)}


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[RunTopics, LogInMemory]]:
    """Return a function that makes the topics of a run over a log; arguments are settings."""
    Submitter.made.clear()

    def made(**settings: Any) -> tuple[RunTopics, LogInMemory]:
        log = LogInMemory({"jobs": 2, "results": 1, "streamworker.events": 3})
        monkeypatch.setattr(module, "LogScanner", lambda _: log)
        for name in ("TransactionalSubmitter", "PlainSubmitter"):
            monkeypatch.setattr(module, name, type(name, (Submitter,), {}))
        loaded = Settings(topics={"results": "results"} | settings.pop("topics", {}), **settings)
        return RunTopics(loaded, "jobs", "streamworker-batch.r"), log

    return made


async def test_endings_are_read_from_results_where_there_are_any(make: Make) -> None:
    """Else from events, which the record of the run names too: a later start must not read the other topic."""
    topics, _ = make()
    assert topics.names == {"jobs": "jobs", "results": "results"}
    assert isinstance(topics.follower(IDS, {0: 0}, lambda _: True, lambda *_: None), ResultFollower)

    topics, _ = make(topics={"results": ""})
    assert topics.names == {"jobs": "jobs", "events": "streamworker.events"}
    assert isinstance(topics.follower(IDS, {0: 0}, lambda _: True, lambda *_: None), EventFollower)


async def test_topic_that_does_not_exist_is_refused_before_anything_is_sent(make: Make) -> None:
    """By its name."""
    topics, log = make()
    del log.numbers["results"]
    with pytest.raises(KafkaRefused, match="topic results does not exist"):
        await topics.open()


@pytest.mark.parametrize(
    ("delivery", "kind", "arguments"),
    [
        ("exactly_once", "TransactionalSubmitter", ("jobs", 2, "streamworker-batch.r")),
        ("at_least_once", "PlainSubmitter", ("jobs", 2)),
    ],
)
async def test_fencing_opens_one_submitter_again_and_again(
    make: Make, delivery: str, kind: str, arguments: tuple[Any, ...]
) -> None:
    """The transactional id is that of the run: a second process of it is fenced."""
    topics, log = make(worker={"delivery": delivery})
    await topics.open()
    await topics.fence()
    await topics.fence()
    [submitter] = Submitter.made

    assert (type(submitter).__name__, submitter.arguments, submitter.opened) == (kind, arguments, 2)
    await topics.close()
    assert (submitter.closed, log.is_stopped) == (1, True)


async def test_topics_that_were_never_fenced_are_closed(make: Make) -> None:
    """A start that fails early has no producer."""
    topics, log = make()
    await topics.close()

    assert log.is_stopped


@pytest.mark.parametrize(
    ("first", "written", "start", "lost"),
    [
        (0, 5, {0: 0}, set()),
        (0, 5, {0: 5}, set()),
        (3, 5, {0: 3}, set()),
        (3, 5, {0: 2}, {0}),
        (0, 5, {0: 6}, {0}),
        (5, 5, {0: 5}, set()),
        (0, 0, {0: 0}, set()),
        (0, 5, {7: 0}, {7}),
        (0, 5, {}, set()),
        (3, 5, {0: 2, 1: 0}, {0}),
    ],
)
async def test_partitions_whose_records_are_not_all_there_are_lost(
    make: Make, first: int, written: int, start: dict[int, int], lost: set[int]
) -> None:
    """Deleted by retention, shorter than it was, or not there: the topic may be another one of the same name."""
    topics, log = make()
    for _ in range(written):
        log.write("jobs", 0, "k", b"")
    log.first[TopicPartition("jobs", 0)] = first
    await topics.open()

    assert await topics.lost("jobs", start) == lost


async def test_jobs_of_the_run_are_found_in_every_partition(make: Make) -> None:
    """Only committed ones, from the start on; other runs, tombstones and records without a key are skipped."""
    topics, log = make()
    log.write("jobs", 0, job_id(9), b"{}")  # before the start of the run
    for key, value in [(job_id(1), b"{}"), ("b.q." + "0" * 32, b"{}"), (None, b"{}"), (job_id(2), None)]:
        log.write("jobs", 0, key, value)
    log.write("jobs", 1, job_id(3, 4), b"not even JSON")
    await topics.open()
    found: list[JobRef] = []
    await topics.read_jobs(IDS, {0: 1}, found.append)

    assert found == [JobRef(digest(1), 0), JobRef(digest(3), 4)]
    assert topics.jobs_positions == {0: 5, 1: 1}
    assert log.scans == [
        (TopicPartition("jobs", 0), 1, 5, True),
        (TopicPartition("jobs", 1), 0, 1, True),
    ]


async def test_jobs_are_read_from_where_retention_has_left_them(make: Make) -> None:
    """Offsets before it cannot be read."""
    topics, log = make()
    for number in range(4):
        log.write("jobs", 0, job_id(number), b"{}")
    log.first[TopicPartition("jobs", 0)] = 3
    await topics.open()
    found: list[JobRef] = []
    await topics.read_jobs(IDS, {0: 1}, found.append)

    assert found == [JobRef(digest(3), 0)]


async def test_submission_advances_the_position_of_its_partitions(make: Make) -> None:
    """A chunk that failed is looked for from there."""
    topics, _ = make()
    await topics.open()
    await topics.fence()
    await topics.read_jobs(IDS, {}, lambda _: None)
    await topics.submit([(b"k", b"v"), (b"k", b"v")])

    assert topics.jobs_positions == {0: 0, 1: 12}


async def test_written_events_are_the_sum_of_all_ends(make: Make) -> None:
    """It grows while any worker is alive; the topic of events need not be one of the run's."""
    topics, log = make()
    await topics.open()
    assert await topics.events_written() == 0
    for partition in (0, 2, 2):
        log.write("streamworker.events", partition, "k", b"")
    del log.numbers["results"]

    assert await topics.events_written() == 3


# Completions that a result does not hold


def omitted(**members: Any) -> EndedJob:
    """Return a result without its completion."""
    defaults: dict[str, Any] = {
        "job_id": job_id(1), "attempt": "a", "status": "completed", "usage_source": "none", "omitted": ["completion"],
        "events": Place("streamworker.events", 1, 2),
    }  # fmt: skip
    return EndedJob(**defaults | members)


def text_of(job: EndedJob) -> str | None:
    """Return the text of a completion."""
    value = json.loads(bytes(job.completion))
    return None if value is None else str(value["choices"][0]["message"]["content"])


def write_events(log: LogInMemory, id_: str, texts: list[str], **options: Any) -> None:
    """Append the events of an attempt to partition 1."""
    for event in events_of(id_, texts, **options):
        log.write("streamworker.events", 1, id_, event)


async def test_omitted_completion_is_read_from_the_events(make: Make) -> None:
    """From the place that the result names to the end of its attempt."""
    topics, log = make()
    write_events(log, job_id(7), ["x"], end=None)
    write_events(log, job_id(1), ["old"], attempt="0", end=None)
    log.write("streamworker.events", 1, job_id(1), None)
    write_events(log, job_id(1), ["a", "b"])
    write_events(log, job_id(1), ["a second run"], attempt="z")
    whole = await topics.read_completion(omitted())

    assert (text_of(whole), whole.omitted) == ("ab", [])
    assert (
        msgspec.structs.replace(whole, completion=msgspec.Raw(b"null"), omitted=["completion"]) == omitted()
    )


@pytest.mark.parametrize(
    ("members", "first"),
    [
        ({"events": None}, 0),
        ({}, 3),
        ({"events": Place("no-such-topic", 0, 0)}, 0),
        ({"attempt": "never written"}, 0),
        ({"events": Place("streamworker.events", 1, 99)}, 0),
    ],
    ids=["no place", "deleted", "no topic", "no such attempt", "past the end"],
)
async def test_completion_whose_events_are_gone_stays_omitted(
    make: Make, members: dict[str, Any], first: int
) -> None:
    """The line then says that it was completed and that its text was not kept."""
    topics, log = make()
    for _ in range(2):
        log.write("streamworker.events", 1, "other", b"{}")
    write_events(log, job_id(1), ["a"])
    log.first[TopicPartition("streamworker.events", 1)] = first
    job = omitted(**members)

    assert await topics.read_completion(job) is job


async def test_broker_that_fails_does_not_make_a_completion_empty(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run stops, and the next start reads it again."""

    async def away(*_: Any, **__: Any) -> int:
        raise KafkaUnavailable("away")

    topics, log = make()
    monkeypatch.setattr(log, "end", away)
    with pytest.raises(KafkaUnavailable):
        await topics.read_completion(omitted())


async def test_topics_are_read_side_by_side(make: Make) -> None:
    """One partition with an open transaction does not delay the others' reading."""
    topics, log = make()
    log.write("jobs", 1, job_id(1), b"{}")
    log.write("jobs", 0, job_id(2), b"{}")
    await topics.open()
    found: list[JobRef] = []
    scan, gate = log.scan, asyncio.Event()

    async def slow(partition: TopicPartition, *arguments: Any, **options: Any) -> Any:
        if partition.partition == 0:
            await gate.wait()
        async for records in scan(partition, *arguments, **options):
            yield records

    log.scan = slow  # type: ignore[method-assign]
    reading = asyncio.create_task(topics.read_jobs(IDS, {}, found.append))
    for _ in range(10):
        await asyncio.sleep(0)
    assert found == [JobRef(digest(1), 0)]
    gate.set()
    await reading

    assert found == [JobRef(digest(1), 0), JobRef(digest(2), 0)]
