"""Submitting lines in chunks, and what becomes of a chunk that failed. The topics are fakes."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from streamworker.batch import submission as module
from streamworker.batch.collector import Collector
from streamworker.batch.errors import OutputBusy, RunStopped
from streamworker.batch.identity import JobIds, JobRef
from streamworker.batch.index import State
from streamworker.batch.intake import Intake
from streamworker.batch.jobs import JobWriter
from streamworker.batch.ledger import Ledger
from streamworker.batch.output import EndedJob, Place
from streamworker.batch.submission import Submission
from streamworker.errors import Fenced, KafkaRefused, KafkaUnavailable, RecordTooLarge
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

IDS = JobIds("b.r.")


class Source:
    """Lines in memory."""

    name = "requests.jsonl"

    def __init__(self, count: int) -> None:
        self.text = b"".join(
            json.dumps({"custom_id": f"c{n}", "body": {"model": "m", "messages": ["x" * (n % 7)]}}).encode()
            + b"\n"
            for n in range(count)
        )

    async def chunks(self) -> AsyncIterator[bytes]:
        yield self.text

    async def read(self, offset: int, length: int) -> bytes:
        return self.text[offset : offset + length]


class Written:
    """Lines of the output."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.buffered = 0

    def write(self, line: bytes, *, is_error: bool) -> None:
        self.lines.append(json.loads(line))


class Topics:
    """The job topic in memory. `faults` are raised by the next submissions; `keeps` says whether they wrote their chunk."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.chunks: list[int] = []
        self.fences = 0
        self.faults: list[tuple[Exception, bool]] = []
        self.fence_faults: list[Exception] = []
        self.refuses: Callable[[bytes], bool] = lambda _: False
        self.jobs_positions: dict[int, int] = {}
        self.on_submit: Callable[[], None] = lambda: None

    async def submit(self, records: list[tuple[bytes, bytes]]) -> None:
        await asyncio.sleep(0)
        self.on_submit()
        if any(self.refuses(value) for _, value in records):
            raise RecordTooLarge("too large")
        fault = self.faults.pop(0) if self.faults else None
        if fault is None or fault[1]:
            self.written += [key for key, _ in records]
            self.chunks.append(len(records))
        if fault is not None:
            raise fault[0]

    async def fence(self) -> None:
        self.fences += 1
        if self.fence_faults:
            raise self.fence_faults.pop(0)

    async def read_jobs(self, ids: JobIds, start: Any, found: Callable[[JobRef], None]) -> None:
        for key in self.written:
            ref = ids.read(key)
            assert ref is not None
            found(ref)


class Case:
    def __init__(self, count: int) -> None:
        self.source, self.output, self.topics, self.notes = Source(count), Written(), Topics(), list[str]()
        self.writer = JobWriter(IDS, "r", metadata={}, on_break="fail")
        self.intake = Intake(self.source, max_job_bytes=1 << 20, writer=self.writer)

    async def start(self, *, window: int = 1000) -> Submission:
        await self.intake.run()
        self.ledger = Ledger(self.intake.index, self.output, lambda: 0.0)  # type: ignore[arg-type]  # only `write` is used
        self.submission = Submission(
            self.ledger,
            self.source,
            self.topics,  # type: ignore[arg-type]  # the methods that it uses
            IDS,
            self.writer,
            window=window,
            note=self.notes.append,
        )
        self.ledger.on_ending = self.submission.wake
        return self.submission

    def end(self, line: int) -> None:
        job = EndedJob(
            job_id="j", attempt="a", status="failed", usage_source="none", error={"code": "x", "message": "m"}
        )
        self.ledger.end(line, f"c{line}", job)


@pytest.fixture(autouse=True)
def _without_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BACKOFF_S", 0.0)


async def test_lines_are_submitted_once_in_the_order_of_the_input() -> None:
    """In chunks of at most 200."""
    case = Case(450)
    await (await case.start()).run()

    refs = [IDS.read(key) for key in case.topics.written]
    assert [case.intake.index.find(ref.digest) for ref in refs if ref] == list(range(450))
    assert case.topics.chunks == [200, 200, 50]
    assert case.ledger.submitted == 450


async def test_chunk_has_at_most_a_mebibyte(monkeypatch: pytest.MonkeyPatch) -> None:
    """And at least one line."""
    monkeypatch.setattr(module, "MAX_CHUNK_BYTES", 700)
    case = Case(10)
    await (await case.start()).run()

    assert sum(case.topics.chunks) == 10
    assert max(case.topics.chunks) <= 4


async def test_window_bounds_the_lines_in_flight() -> None:
    """More are submitted as lines end."""
    case = Case(25)
    submission = await case.start(window=10)
    running = asyncio.create_task(submission.run())
    await asyncio.sleep(0.05)
    assert (case.ledger.submitted, running.done()) == (10, False)
    for line in range(20):
        case.end(line)
        await asyncio.sleep(0.01)
        assert case.ledger.submitted <= 10
    await asyncio.wait_for(running, 5)

    assert len(case.topics.written) == len(set(case.topics.written)) == 25


async def test_submission_that_is_stopped_submits_nothing_more() -> None:
    """It does not wait for endings."""
    case = Case(25)
    submission = await case.start(window=10)
    running = asyncio.create_task(submission.run())
    await asyncio.sleep(0.05)
    submission.is_stopped = True
    submission.wake()
    await asyncio.wait_for(running, 5)

    assert len(case.topics.written) == 10


@pytest.mark.parametrize("was_written", [False, True])
async def test_chunk_whose_outcome_is_unknown_is_looked_up(was_written: bool) -> None:
    """After the fence the topic has it, or never will: no line is lost or submitted twice."""
    case = Case(30)
    submission = await case.start()
    case.topics.faults = [(KafkaUnavailable("gone"), was_written)]
    await submission.run()

    assert len(case.topics.written) == len(set(case.topics.written)) == 30
    assert (case.topics.fences, case.notes) == (1, ["gone; trying again"])
    assert case.ledger.submitted == 30


async def test_line_that_ended_during_a_failed_chunk_stays_ended() -> None:
    """Its ending may come before the acknowledgement."""
    case = Case(3)
    submission = await case.start()
    case.topics.faults = [(KafkaUnavailable("gone"), True)]
    case.topics.on_submit = lambda: case.end(0) if case.ledger.submitted == 3 else None
    await submission.run()

    assert case.intake.index.counts[State.FAILED] == 1
    assert case.ledger.submitted == 2


async def test_producer_that_is_fenced_at_once_is_not_opened_again() -> None:
    """Another run is active; this one must not fence it in turn."""
    case = Case(3)
    submission = await case.start()
    case.topics.faults = [(Fenced("x"), False)]
    with pytest.raises(OutputBusy, match=r"another run is active under the name b\.r"):
        await submission.run()
    assert case.topics.fences == 0


async def test_producer_that_is_fenced_after_a_long_transaction_is_opened_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The broker may have aborted it for its age, as after an outage."""
    monkeypatch.setattr(module, "_QUICK_S", 0.0)
    case = Case(3)
    submission = await case.start()
    case.topics.faults = [(Fenced("x"), False)]
    await submission.run()

    assert (case.topics.fences, len(case.topics.written)) == (1, 3)


async def test_line_over_the_topic_s_limit_fails_alone() -> None:
    """The chunk is divided until the line is alone; the others are submitted once."""
    case = Case(40)
    submission = await case.start()
    case.topics.refuses = lambda value: b'"c17"' in value
    await submission.run()

    assert len(case.topics.written) == len(set(case.topics.written)) == 39
    assert [line["error"]["code"] for line in case.output.lines] == ["too_large"]
    assert case.output.lines[0]["custom_id"] == "c17"
    assert "max.message.bytes" in case.output.lines[0]["error"]["message"]


async def test_refusal_of_the_broker_ends_the_submission() -> None:
    """A person has to change something."""
    case = Case(3)
    submission = await case.start()
    case.topics.faults = [(KafkaRefused("no ACL"), False)]
    with pytest.raises(KafkaRefused):
        await submission.run()

    case = Case(3)
    submission = await case.start()
    case.topics.faults = [(KafkaUnavailable("gone"), False)]
    case.topics.fence_faults = [KafkaRefused("no ACL")]
    with pytest.raises(KafkaRefused):
        await submission.run()


async def test_outage_is_waited_out_for_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the run stops, and is to be run again."""
    case = Case(3)
    submission = await case.start()
    case.topics.faults = [(KafkaUnavailable("gone"), False)]
    case.topics.fence_faults = [KafkaUnavailable("still gone")] * 3
    await submission.run()
    assert (case.topics.fences, len(case.topics.written)) == (4, 3)

    monkeypatch.setattr(module, "OUTAGE_S", -1.0)
    case = Case(3)
    submission = await case.start()
    case.topics.faults = [(KafkaUnavailable("gone"), False)]
    case.topics.fence_faults = [KafkaUnavailable("still gone")]
    with pytest.raises(RunStopped, match="still gone; run the same command again"):
        await submission.run()


async def test_input_that_changes_while_it_is_read_stops_the_run() -> None:
    """A line is what it was when the file was indexed."""
    case = Case(3)
    submission = await case.start()
    case.source.text = case.source.text.replace(b'"c2"', b'"c9"')
    with pytest.raises(RunStopped, match=r"requests\.jsonl was changed while it was read \(line 3\)"):
        await submission.run()


async def test_rounds_are_distinguished() -> None:
    """A line that is run again has another job id, and an earlier job of it does not count."""
    case = Case(1)
    submission = await case.start()
    digest = case.intake.index.digest(0)
    case.intake.index.set_round(0, 2)
    case.topics.written = [IDS.job_id(digest, 1).encode()]
    case.topics.faults = [(KafkaUnavailable("gone"), False)]
    await submission.run()

    assert case.topics.written[-1].decode() == IDS.job_id(digest, 2)


# Endings that a record does not hold whole


class Tail:
    """Positions of the topic of endings."""

    def __init__(self) -> None:
        self.positions = {0: 100}
        self.paused: set[int] = set()
        self.pause, self.resume = self.paused.add, self.paused.discard


class Follower:
    """The topic of endings: the test calls `on_ending`."""

    def __init__(self) -> None:
        self.tail = Tail()

    def positions(self) -> dict[int, int]:
        return dict(self.tail.positions)


class EndingTopics(Topics):
    def __init__(self) -> None:
        super().__init__()
        self.follow = Follower()

    def follower(self, _ids: Any, _start: Any, wants: Any, on_ending: Any) -> Any:
        self.wants, self.on_ending = wants, on_ending
        return self.follow

    async def read_completion(self, job: EndedJob) -> EndedJob:
        await asyncio.sleep(0.01)
        return msgspec.structs.replace(job, completion=msgspec.Raw(b'{"choices":[1]}'), omitted=[])


async def test_ending_without_its_completion_is_completed_from_the_events() -> None:
    """Until then a later run would have to read the record again; a repeated record changes nothing."""
    case = Case(2)
    await case.start()
    topics = EndingTopics()
    collector = Collector(case.ledger, case.source, case.output, topics, IDS, {})  # type: ignore[arg-type]  # fakes
    ref = JobRef(case.intake.index.digest(0), 0)
    job = EndedJob(
        job_id="j",
        attempt="a",
        status="completed",
        usage_source="none",
        omitted=["completion"],
        events=Place("t", 0, 5),
    )
    case.ledger.begin([0, 1])
    assert topics.wants(ref)
    topics.on_ending(ref, job, 0, 42)
    topics.on_ending(ref, job, 0, 42)
    assert collector.positions() == {0: 42}
    completing = asyncio.create_task(collector.complete())
    await eventually(lambda: case.output.lines)
    completing.cancel()

    assert [line["custom_id"] for line in case.output.lines] == ["c0"]
    assert case.output.lines[0]["response"]["body"] == {"choices": [1]}
    assert (collector.positions(), topics.wants(ref)) == ({0: 100}, False)


async def test_output_that_is_not_flushed_pauses_the_reader() -> None:
    """Memory is bounded where the output is slower than Kafka, as a pipe may be."""
    case = Case(2)
    await case.start()
    topics = EndingTopics()
    collector = Collector(case.ledger, case.source, case.output, topics, IDS, {})  # type: ignore[arg-type]  # fakes
    case.ledger.begin([0, 1])
    case.output.buffered = 17 << 20
    job = EndedJob(
        job_id="j", attempt="a", status="failed", usage_source="none", metadata={"custom_id": "c0"}
    )
    topics.on_ending(JobRef(case.intake.index.digest(0), 0), job, 0, 42)
    assert topics.follow.tail.paused == {0}
    collector.relieve()
    assert topics.follow.tail.paused == {0}
    case.output.buffered = 0
    collector.relieve()

    assert topics.follow.tail.paused == set()


async def test_ending_without_a_custom_id_gets_it_from_the_input() -> None:
    """A rejected job has no metadata."""
    case = Case(1)
    await case.start()
    topics = EndingTopics()
    collector = Collector(case.ledger, case.source, case.output, topics, IDS, {})  # type: ignore[arg-type]  # fakes
    case.ledger.begin([0])
    job = EndedJob(job_id="j", attempt="a", status="rejected", usage_source="none")
    topics.on_ending(JobRef(case.intake.index.digest(0), 0), job, 0, 42)
    assert not collector.has_reached({0: 100})
    completing = asyncio.create_task(collector.complete())
    await eventually(lambda: case.output.lines)
    completing.cancel()

    assert case.output.lines[0]["custom_id"] == "c0"
    assert collector.has_reached({0: 100})
    assert not collector.has_reached({0: 101})
