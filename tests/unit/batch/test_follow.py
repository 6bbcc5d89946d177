"""Endings of a run's jobs, from results and from events."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from structlog.testing import capture_logs

from streamworker.batch.follow import EventFollower, ResultFollower
from streamworker.batch.identity import JobRef
from streamworker.config import KafkaSettings
from tests.unit.batch.logs import IDS, digest, events_of, job_id, record, result_of

if TYPE_CHECKING:
    from streamworker.batch.output import EndedJob


class Case:
    """A follower of either kind, and what it has reported."""

    def __init__(self, kind: type[EventFollower | ResultFollower]) -> None:
        self.endings: list[tuple[JobRef, EndedJob, int, int]] = []
        self.unwanted: set[JobRef] = set()
        self.asked: list[JobRef] = []
        self.follower: Any = kind(
            KafkaSettings(), "topic", {0: 0, 1: 0}, IDS, wants=self.wants, on_ending=self.ended
        )

    def wants(self, ref: JobRef) -> bool:
        """Want everything but `unwanted`."""
        self.asked.append(ref)
        return ref not in self.unwanted

    def ended(self, ref: JobRef, job: EndedJob, partition: int, offset: int) -> None:
        """Note an ending."""
        self.endings.append((ref, job, partition, offset))

    def read(self, *records: Any, partition: int = 0) -> None:
        """Pass records as the tail does, which advances its position first."""
        self.follower.tail.positions[partition] = records[-1].offset + 1
        self.follower._read(partition, records, records[-1].offset + 1)

    def read_events(self, id_: str, texts: list[str], offset: int, **options: Any) -> int:
        """Pass the events of an attempt from an offset on; return the next offset."""
        for event in events_of(id_, texts, **options):
            self.read(record(id_, event, offset))
            offset += 1
        return offset

    def contents(self) -> list[str]:
        """Return the texts of the completions."""
        return [
            json.loads(bytes(job.completion))["choices"][0]["message"]["content"]
            for _, job, _, _ in self.endings
        ]


@pytest.fixture(params=[ResultFollower, EventFollower])
async def case(request: pytest.FixtureRequest) -> Case:
    """Return a follower of each kind."""
    return Case(request.param)


@pytest.fixture
async def events() -> Case:
    """Return a follower of the events topic."""
    return Case(EventFollower)


async def test_result_is_reported_with_its_place() -> None:
    """Line and round are those of the key; the completion is passed on byte for byte."""
    case = Case(ResultFollower)
    value = json.dumps(result_of(job_id(3, 2))).encode()
    case.read(record(job_id(3, 2), value[:-1] + b', "completion": {"n" : 1.50}}', 7), partition=1)
    [(ref, job, partition, offset)] = case.endings

    assert (ref, partition, offset) == (JobRef(digest(3), 2), 1, 7)
    assert (job.job_id, job.status, bytes(job.completion)) == (job_id(3, 2), "completed", b'{"n" : 1.50}')
    assert case.follower.positions() == {0: 0, 1: 8}


@pytest.mark.parametrize(
    "key", [None, "b.other.00000000000000000000000000000003", "b.r.3", "acme." + job_id(3), "b.r.", ""]
)
async def test_record_of_another_job_is_skipped(case: Case, key: str | None) -> None:
    """Its value is not even decoded."""
    with capture_logs() as logs:
        case.read(record(key, b"{"))

    assert (case.endings, case.asked, logs) == ([], [], [])


async def test_record_of_a_job_that_has_ended_is_not_decoded(case: Case) -> None:
    """Results of earlier starts are most of what a later start reads."""
    case.unwanted = {JobRef(digest(3), 0)}
    with capture_logs() as logs:
        case.read(record(job_id(3), b"{"))

    assert (case.endings, logs) == ([], [])


async def test_tombstone_of_a_job_is_not_an_ending(case: Case) -> None:
    """Its owner has erased the text."""
    case.read(record(job_id(3), None))

    assert case.endings == []


@pytest.mark.parametrize("value", [b"{", b"[]", b'{"job_id":5}', b"\xff", b"[" * 5000])
async def test_record_that_cannot_be_read_is_logged_with_its_place(case: Case, value: bytes) -> None:
    """The records behind it are read."""
    with capture_logs() as logs:
        case.read(record(job_id(3), value, 5), record("other", None, 6))

    assert [(entry["event"], entry["at"]) for entry in logs] == [("batch.record_ignored", "0-5")]
    assert case.endings == []
    assert case.follower.positions()[0] == 7


async def test_ending_of_events_has_the_completion_of_its_deltas(events: Case) -> None:
    """Also where the events of two jobs alternate."""
    one, two = (events_of(job_id(n), [f"{n}a", f"{n}b"]) for n in (1, 2))
    for offset, event in enumerate(event for pair in zip(one, two, strict=True) for event in pair):
        events.read(record(event["job_id"], event, offset))

    assert [ref.digest for ref, *_ in events.endings] == [digest(1), digest(2)]
    assert events.contents() == ["1a1b", "2a2b"]
    assert [offset for *_, offset in events.endings] == [6, 7]


async def test_position_of_events_is_the_first_one_of_an_open_job(events: Case) -> None:
    """A later start must see the whole answer; what has ended is not read again."""
    next_ = events.read_events(job_id(1), ["x"], 0)
    assert events.follower.positions() == {0: 3, 1: 0}
    open_ = next_
    next_ = events.read_events(job_id(2), ["x"], next_, end=None)
    next_ = events.read_events(job_id(3), ["x"], next_)
    assert events.follower.positions()[0] == open_

    [*_, last] = events_of(job_id(2), ["x"])
    events.read(record(job_id(2), last, next_))
    assert events.follower.positions()[0] == next_ + 1


async def test_new_attempt_voids_the_text_and_keeps_the_position(events: Case) -> None:
    """The former attempt's late deltas do not count; the first event of the job is still the place to read from."""
    next_ = events.read_events(job_id(1), ["old"], 4, end=None)
    next_ = events.read_events(job_id(1), ["new"], next_, attempt="b", end=None)
    late = {**events_of(job_id(1), ["old", "late"])[2]}
    events.read(record(job_id(1), late, next_))
    assert events.follower.positions()[0] == 4

    [*_, last] = events_of(job_id(1), ["new"], attempt="b")
    events.read(record(job_id(1), last, next_ + 1))
    assert events.contents() == ["new"]
    assert events.endings[0][1].attempt == "b"


async def test_rejected_job_has_an_ending_without_a_start(events: Case) -> None:
    """Its only event is terminal, and it has no completion."""
    usage = {**events_of(job_id(1), [], end="rejected")[-1], "seq": 0, "error": {"code": "invalid_job"}}
    events.read(record(job_id(1), usage, 2))
    [(_, job, _, offset)] = events.endings

    assert (job.status, job.error, offset) == ("rejected", {"code": "invalid_job"}, 2)
    assert events.follower.positions()[0] == 3


async def test_job_that_ends_twice_is_reported_once(events: Case) -> None:
    """The caller does not want it any more after its first ending."""
    for event in events_of(job_id(1), ["x"]):
        events.read(record(job_id(1), event))
    events.unwanted = {JobRef(digest(1), 0)}
    events.read_events(job_id(1), ["y"], 10, attempt="b")

    assert events.contents() == ["x"]
    assert events.follower.positions()[0] == 13
