"""One job from its `started` to its terminal event, against an upstream, a sink and a broker in memory."""

from __future__ import annotations

import asyncio
import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.errors import RecordTooLarge, UpstreamError
from streamworker.model import Coordinates, ErrorCode, JobError, TopicPartition
from streamworker.testing import (
    MemoryClock,
    MemoryCommitStores,
    MemoryObserver,
    MemorySink,
    MemoryUpstream,
    Script,
    Step,
)
from streamworker.worker.committer import PartitionCommitter
from streamworker.worker.publisher import DELTAS_PER_TURN
from tests.streams import NOW, chunk, data, make_job
from tests.turnable import quiet, until
from tests.unit.worker.bench import (
    DONE,
    FINISH,
    JOBS,
    OneAttempt,
    events,
    make_policy,
    make_queues,
    make_tools,
    read,
    said,
    summary,
    word,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable

TO = TopicPartition("events", 2)
PING = b": ping\n\n"


class Bench:
    """One job on its lane; `written` is what the lane wrote, `sink.records` what was published."""

    def __init__(self) -> None:
        self.broker = MemoryCommitStores()
        self.sink = MemorySink()
        self.clock = MemoryClock(NOW)
        self.observer = MemoryObserver()
        self.committer = PartitionCommitter(
            JOBS, self.broker.store(JOBS), commit_id="me", lost=lambda _: None
        )
        self.committing: asyncio.Task[None] | None = None
        self.task: asyncio.Task[Any] | None = None
        self.upstream = MemoryUpstream([])

    async def open(self) -> None:
        await self.committer.open()
        self.committer.progress.begin(7)
        self.committer.progress.count(7)
        self.committing = asyncio.create_task(self.committer.run())

    async def close(self) -> None:
        tasks = [task for task in (self.committing, self.task) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.committer.close()

    def runner(
        self, script: Script | Iterable[Step], *, policy: Any = None, tools: Any = None, **members: Any
    ) -> OneAttempt:
        self.upstream = MemoryUpstream(script)
        queues = make_queues(self.observer, {"default": make_policy(self.upstream, **(policy or {}))})
        job = make_job(source=Coordinates("jobs", 0, 7), **members)
        tools_ = make_tools(self.sink, self.clock, self.observer, queues, **(tools or {}))
        return OneAttempt(tools_, job, self.committer, to=TO, upstream="default")

    def begin(self, script: Script | Iterable[Step], **options: Any) -> OneAttempt:
        """Run a job in the background."""
        runner = self.runner(script, **options)
        self.task = asyncio.create_task(runner.play())
        return runner

    async def end(self) -> dict[str, Any]:
        """Wait for the job; return its terminal event, as it was written."""
        assert self.task is not None
        async with asyncio.timeout(10_000):
            await self.task
        terminal = read(self.broker.records()[-1])
        assert terminal["type"] == "usage"
        return terminal

    async def play(self, script: Script | Iterable[Step], **options: Any) -> dict[str, Any]:
        self.begin(script, **options)
        return await self.end()

    @property
    def text(self) -> str:
        return "".join(event["delta"].get("content", "") for event in events(self.sink.records))

    @property
    def written(self) -> list[str]:
        return [event["type"] for event in events(self.broker.records())]


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    await bench.open()
    yield bench
    await bench.close()


def outcome(terminal: dict[str, Any]) -> tuple[str, str | None]:
    """Status and error code."""
    return terminal["status"], terminal["error"] and terminal["error"]["code"]


async def test_execution_stream_that_goes_well_completes(bench: Bench) -> None:
    """`started`, deltas and terminal are numbered without a gap, in one partition, under the job's key."""
    terminal = await bench.play(said("one ", "two"))

    started, usage = events(bench.broker.records())
    deltas = events(bench.sink.records)
    assert bench.text == "one two"
    assert [event["seq"] for event in (started, *deltas, usage)] == [0, 1, 2, 3, 4]
    assert {event["attempt"] for event in (started, *deltas, usage)} == {started["attempt"]}
    assert outcome(terminal) == ("completed", None)
    everything = bench.sink.records + bench.broker.records()
    assert {(record.topic_partition, record.key) for record in everything} == {(TO, b"job-1")}
    assert bench.upstream.calls[0].is_drained
    assert bench.upstream.open_calls == 0


async def test_execution_calls_the_upstream_with_the_job_and_its_trace(bench: Bench) -> None:
    """The request goes on with streaming turned on; only the trace's headers are passed along."""
    await bench.play(said("a"), trace=(("traceparent", b"00-1-2-01"), ("tracestate", b"\xff")))

    (call,) = bench.upstream.calls
    assert json.loads(call.body) == {"model": "m", "stream": True, "stream_options": {"include_usage": True}}
    assert call.headers == {"traceparent": "00-1-2-01"}


@pytest.mark.parametrize("value", [b"00-1\r\nx-injected: 1", b"00-1\0", b"\x7f"])
async def test_execution_trace_that_is_no_header_is_not_passed_on(bench: Bench, value: bytes) -> None:
    """A record's header can neither add a header to the call nor make it impossible."""
    await bench.play(said("a"), trace=(("traceparent", value),))

    assert bench.upstream.calls[0].headers == {}


async def test_execution_upstream_is_called_before_started_is_written(bench: Bench) -> None:
    """The upstream's first delta and the commit take their time side by side."""
    bench.broker.committing.clear()
    bench.begin(said("one"))
    await quiet()

    assert bench.upstream.open_calls == 1
    assert bench.broker.records() == []


async def test_execution_deltas_wait_for_started(bench: Bench) -> None:
    """A reader never sees a delta of an attempt it was not told of; meanwhile nothing more is read."""
    bench.broker.committing.clear()
    bench.begin(said("one ", "two ", "three"))
    await asyncio.sleep(1000)
    assert bench.sink.records == []
    assert bench.upstream.calls[0].reads == 1
    bench.broker.committing.set()
    terminal = await bench.end()

    assert bench.text == "one two three"
    assert outcome(terminal) == ("completed", None)


async def test_execution_terminal_waits_for_all_acknowledgements(bench: Bench) -> None:
    """The terminal event says that everything before it is there; the offset goes with it, not before."""
    bench.sink.acknowledges = False
    bench.begin(said("one ", "two"))
    await asyncio.sleep(1000)
    assert len(bench.sink.records) == 3
    assert bench.written == ["started"]
    assert bench.broker.points[JOBS].offset == 0
    bench.sink.acknowledge()
    await bench.end()

    assert bench.written == ["started", "usage"]
    assert bench.broker.points[JOBS].offset == 8


async def test_execution_connection_is_free_while_acknowledgements_are_awaited(bench: Bench) -> None:
    """A slow broker holds no upstream connection once the stream has ended."""
    bench.sink.acknowledges = False
    bench.begin(said("one"))
    await quiet()

    assert bench.upstream.open_calls == 0


async def test_execution_returns_once_the_terminal_is_durable(bench: Bench) -> None:
    """`job_ended` is told of what a reader can see."""
    bench.begin([word("one"), gate := asyncio.Event(), FINISH, DONE])
    await until(lambda: bench.written == ["started"])
    bench.broker.committing.clear()
    gate.set()
    await asyncio.sleep(100)
    assert bench.observer.all("job_ended") == []
    bench.broker.committing.set()
    await bench.end()

    assert len(bench.observer.all("job_ended")) == 1


async def test_execution_without_room_in_the_sink_does_not_read_the_socket(bench: Bench) -> None:
    """Backpressure reaches the upstream; its silence meanwhile is ours, and no timeout counts it."""
    bench.begin(said(*"abcdefgh"), policy={"idle_timeout_s": 5, "first_delta_timeout_s": 5})
    bench.sink.keeping_up.clear()
    await asyncio.sleep(3600)
    assert bench.upstream.calls[0].reads == 1
    assert bench.sink.records == []
    bench.sink.keeping_up.set()
    terminal = await bench.end()

    assert bench.text == "abcdefgh"
    assert outcome(terminal) == ("completed", None)


async def test_execution_many_deltas_in_one_read_stop_where_the_room_ends(bench: Bench) -> None:
    """Room is asked for before every delta, not once per read."""
    bench.begin([word("a") + word("b") + word("c"), FINISH + DONE])
    publish = bench.sink.publish

    def publish_one(*arguments: Any) -> None:
        publish(*arguments)
        bench.sink.keeping_up.clear()

    bench.sink.publish = publish_one  # type: ignore[method-assign,assignment]
    await asyncio.sleep(60)
    assert bench.text == "a"
    bench.sink.keeping_up.set()
    await asyncio.sleep(60)
    assert bench.text == "ab"


async def test_execution_firehose_lets_others_have_their_turn(bench: Bench) -> None:
    """One read with thousands of deltas does not keep the loop to itself, and loses nothing by it."""
    turns: list[int] = []

    async def other() -> None:
        while True:
            turns.append(len(bench.text))
            await asyncio.sleep(0)

    bystander = asyncio.create_task(other())
    bench.begin([word("x") * 5 * DELTAS_PER_TURN, FINISH + DONE])
    terminal = await bench.end()
    bystander.cancel()

    assert outcome(terminal) == ("completed", None)
    assert bench.text == "x" * 5 * DELTAS_PER_TURN
    steps = [after - before for before, after in pairwise(turns)]
    assert max(steps) == DELTAS_PER_TURN


async def test_execution_cancelled_between_turns_ends_with_what_was_published(bench: Bench) -> None:
    """A delta that waits for its turn has not been: the terminal event takes its place."""
    runner = bench.begin([word("x") * 3 * DELTAS_PER_TURN, asyncio.Event()])
    while not bench.text:  # noqa: ASYNC110 - a turn of the loop at a time
        await asyncio.sleep(0)
    runner.cancel("enough")
    terminal = await bench.end()

    assert outcome(terminal) == ("cancelled", "cancelled")
    assert len(bench.text) < 3 * DELTAS_PER_TURN
    assert terminal["seq"] == len(bench.text) + 1
    assert terminal["observed"]["deltas"] == len(bench.text)


async def test_execution_wound_up_while_there_is_no_room_counts_what_it_then_publishes(bench: Bench) -> None:
    """The delta on its way goes out when there is room, and the terminal event comes after it, with the report."""
    report = data(b'{"choices":[],"usage":{"completion_tokens":2}}')
    script: list[Step] = [word("a"), 1.0, word("b") + word("c") + FINISH + report + DONE]
    runner = bench.begin(script, policy={"cancel_grace_s": 60})
    await until(lambda: bench.text == "a")
    bench.sink.keeping_up.clear()
    await asyncio.sleep(2)
    runner.cancel("enough")
    bench.sink.keeping_up.set()
    terminal = await bench.end()

    assert outcome(terminal) == ("cancelled", "cancelled")
    assert bench.text == "ab"
    assert (terminal["seq"], terminal["observed"]["deltas"]) == (3, 2)
    assert terminal["usage"] == {"completion_tokens": 2}


async def test_execution_cancelled_while_there_is_no_room_ends_cancelled(bench: Bench) -> None:
    """A control record gets through where deltas do not; the delta that found no room never had a seq."""
    runner = bench.begin([word("a"), asyncio.Event()])
    bench.sink.keeping_up.clear()
    await asyncio.sleep(60)
    runner.cancel("enough")
    terminal = await bench.end()

    assert outcome(terminal) == ("cancelled", "cancelled")
    assert bench.upstream.open_calls == 0
    assert terminal["seq"] == 1 + len(bench.sink.records)


async def test_execution_without_first_delta_fails_in_time(bench: Bench) -> None:
    """The timeout runs from the call, whatever the upstream does but speak."""
    began = asyncio.get_running_loop().time()
    terminal = await bench.play(Script([20.0, PING, 20.0, PING, asyncio.Event()], before=[15.0]))

    assert outcome(terminal) == ("failed", "timeout_first_delta")
    assert terminal["error"]["retriable"]
    assert round(asyncio.get_running_loop().time() - began) == 60
    assert bench.upstream.open_calls == 0


async def test_execution_without_answer_fails_at_the_first_delta_timeout(bench: Bench) -> None:
    """An upstream that accepts the call and says nothing is no different."""
    terminal = await bench.play(Script([], before=[asyncio.Event()]))

    assert outcome(terminal) == ("failed", "timeout_first_delta")
    assert terminal["tries"] == 1


async def test_execution_silent_after_a_delta_is_interrupted(bench: Bench) -> None:
    """What was said counts; the usage is an estimate then."""
    terminal = await bench.play([word("one"), asyncio.Event()])

    assert outcome(terminal) == ("interrupted", "timeout_idle")
    assert terminal["usage_source"] == "estimated"
    assert bench.text == "one"
    assert bench.upstream.open_calls == 0


async def test_execution_pings_do_not_count_as_life(bench: Bench) -> None:
    """Comments keep a connection open, not a generation alive."""
    pings: list[Step] = [word("one"), *[step for _ in range(1000) for step in (10.0, PING)]]
    began = asyncio.get_running_loop().time()
    terminal = await bench.play(pings)

    assert outcome(terminal) == ("interrupted", "timeout_idle")
    assert round(asyncio.get_running_loop().time() - began) == 30


async def test_execution_slow_but_steady_stream_completes(bench: Bench) -> None:
    """Each delta begins the idle timeout anew, so that an hour's stream is fine."""
    script: list[Step] = []
    for _ in range(150):
        script += [29.0, word("x")]
    terminal = await bench.play([*script, FINISH, DONE])

    assert outcome(terminal) == ("completed", None)
    assert bench.text == "x" * 150


async def test_execution_past_its_deadline_expires_without_a_call(bench: Bench) -> None:
    """Nothing is generated that nobody waits for."""
    terminal = await bench.play(said("one"), deadline=NOW / 1000 - 1)

    assert outcome(terminal) == ("expired", "deadline")
    assert terminal["tries"] == 0
    assert bench.upstream.calls == []
    assert bench.written == ["started", "usage"]


async def test_execution_reaching_its_deadline_expires_in_the_stream(bench: Bench) -> None:
    """However lively it is."""
    began = asyncio.get_running_loop().time()
    steady: list[Step] = [step for _ in range(1000) for step in (word("x"), 0.9)]
    terminal = await bench.play(steady, deadline=NOW / 1000 + 5)

    assert outcome(terminal) == ("expired", "deadline")
    assert round(asyncio.get_running_loop().time() - began) == 5
    assert bench.text == "x" * 6
    assert terminal["seq"] == 7
    assert bench.upstream.open_calls == 0


@pytest.mark.parametrize("script", [Script([], before=[asyncio.Event()]), [asyncio.Event()]])
async def test_execution_cancelled_before_a_delta_ends_cancelled(bench: Bench, script: Any) -> None:
    """Whether the upstream has answered or not."""
    runner = bench.begin(script)
    await quiet()
    runner.cancel("the user has gone")
    terminal = await bench.end()

    assert outcome(terminal) == ("cancelled", "cancelled")
    assert terminal["error"]["message"] == "the user has gone"
    assert (terminal["usage"], terminal["usage_source"]) == (None, "none")
    assert bench.upstream.open_calls == 0


async def test_execution_cancelled_in_the_stream_keeps_what_was_said(bench: Bench) -> None:
    """The terminal event follows the last delta."""
    runner = bench.begin([word("one"), asyncio.Event()])
    await until(lambda: bench.text == "one")
    runner.cancel("")
    terminal = await bench.end()

    assert outcome(terminal) == ("cancelled", "cancelled")
    assert terminal["error"]["message"] == "cancelled"
    assert terminal["seq"] == 2


async def test_execution_cancelled_after_the_stream_ended_still_completes(bench: Bench) -> None:
    """The end was there first."""
    bench.sink.acknowledges = False
    runner = bench.begin(said("one"))
    await quiet()
    runner.cancel("too late")
    bench.sink.acknowledge()

    assert outcome(await bench.end()) == ("completed", None)


async def test_execution_refused_by_the_upstream_fails_with_its_words(bench: Bench) -> None:
    """Secrets in them are left out."""
    error = JobError(ErrorCode.AUTH, "wrong key sk-secret", 401, '{"key":"sk-secret"}')
    terminal = await bench.play(Script([], before=[UpstreamError(error)]))

    assert outcome(terminal) == ("failed", "auth")
    assert terminal["error"]["message"] == "wrong key ***"
    assert terminal["error"]["upstream"] == '{"key":"***"}'
    assert terminal["seq"] == 1


@pytest.mark.parametrize(
    ("before", "expected"), [([], ("failed", "truncated")), ([word("one")], ("interrupted", "truncated"))]
)
async def test_execution_broken_in_the_stream_ends_by_what_was_had(
    bench: Bench, before: list[bytes], expected: tuple[str, str]
) -> None:
    """Without a delta the job failed, with one it was interrupted."""
    error = JobError(ErrorCode.TRUNCATED, "reset", 200, retriable=True)

    assert outcome(await bench.play([*before, UpstreamError(error)])) == expected


async def test_execution_broken_after_the_finish_reason_is_complete(bench: Bench) -> None:
    """Nothing is missing, however the connection ended."""
    error = JobError(ErrorCode.TRUNCATED, "reset", 200, retriable=True)

    assert outcome(await bench.play([word("one"), FINISH, UpstreamError(error)])) == ("completed", None)


async def test_execution_body_that_ends_without_done_is_truncated(bench: Bench) -> None:
    """A clean end of the body is not the protocol's end."""
    assert outcome(await bench.play([word("one")])) == ("interrupted", "truncated")


async def test_execution_answer_that_is_not_complete_is_not_drained(bench: Bench) -> None:
    """A stream that went wrong is closed at once: the upstream is to stop."""
    frame = data({"error": {"message": "no"}})
    terminal = await bench.play([word("one") + frame, asyncio.Event()])

    assert outcome(terminal) == ("interrupted", "upstream_error")
    assert not bench.upstream.calls[0].is_drained
    assert bench.upstream.open_calls == 0


async def test_execution_delta_over_the_record_limit_ends_the_job_before_it(bench: Bench) -> None:
    """It is as if the delta had never been: the terminal event has its seq, and the upstream is told to stop."""
    script: list[Step] = [word("one ") + word("x" * 20_000) + word("never"), asyncio.Event()]
    terminal = await bench.play(script, tools={"max_record_bytes": 16_384})

    assert outcome(terminal) == ("interrupted", "too_large")
    assert bench.text == "one "
    assert terminal["seq"] == 2
    assert terminal["observed"]["deltas"] == 1
    assert bench.upstream.open_calls == 0


async def test_execution_first_delta_over_the_record_limit_fails(bench: Bench) -> None:
    """No delta was ever had."""
    terminal = await bench.play([word("x" * 20_000)], tools={"max_record_bytes": 16_384})

    assert outcome(terminal) == ("failed", "too_large")
    assert terminal["seq"] == 1


async def test_execution_delta_that_the_broker_refuses_interrupts_the_job(bench: Bench) -> None:
    """Readers miss it, so the job is not complete; its seq stays taken."""
    bench.sink.acknowledges = False
    bench.begin(said("one ", "two"))
    await quiet()
    bench.sink.acknowledge(RecordTooLarge("the topic takes less"))
    terminal = await bench.end()

    assert outcome(terminal) == ("interrupted", "too_large")
    assert terminal["seq"] == 4


async def test_execution_report_over_the_record_limit_is_left_out(bench: Bench) -> None:
    """An upstream cannot make a terminal event that no broker takes; the partition's other jobs would pay for it."""
    bench.broker.max_record_bytes = 16_384
    report = data(chunk({}, "stop", usage={"completion_tokens": 1, "note": "x" * 20_000}))
    terminal = await bench.play([word("one"), report, DONE], tools={"max_record_bytes": 16_384})

    assert outcome(terminal) == ("interrupted", "too_large")
    assert (terminal["usage"], terminal["usage_source"]) == (None, "none")
    assert terminal["seq"] == 3


async def test_execution_server_event_over_the_limit_is_a_protocol_error(bench: Bench) -> None:
    """Memory is bounded whatever the upstream sends."""
    terminal = await bench.play(
        [word("one"), b"data: " + b"x" * 3000, asyncio.Event()], tools={"max_event_bytes": 2048}
    )

    assert outcome(terminal) == ("interrupted", "upstream_protocol")
    assert bench.upstream.open_calls == 0


@pytest.mark.parametrize("script", [Script([], before=[asyncio.Event()]), [word("one"), asyncio.Event()]])
async def test_execution_task_cancelled_closes_the_call_and_writes_nothing_more(
    bench: Bench, script: Any
) -> None:
    """The next owner begins the job anew; no terminal event comes from here."""
    bench.begin(script)
    await quiet()
    assert bench.task is not None
    bench.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bench.task
    published = len(bench.sink.records)
    await asyncio.sleep(1000)

    assert bench.upstream.open_calls == 0
    assert bench.written == ["started"]
    assert len(bench.sink.records) == published
    assert bench.observer.all("job_ended") == []


async def test_execution_tells_the_observer_what_happened(bench: Bench) -> None:
    """Started, the first delta once, every delta, and the end."""
    bench.begin([word("a"), gate := asyncio.Event(), word("b") + word("c"), 3.0, FINISH + DONE])
    await until(lambda: bench.text == "a")
    bench.clock.turn(2)
    gate.set()
    await bench.end()

    assert [name for name, _ in bench.observer.told] == [
        "job_started",
        "first_delta",
        "deltas_published",
        "deltas_published",
        "deltas_published",
        "job_ended",
    ]
    assert bench.observer.all("first_delta") == [("default", 0.0)]
    reads = bench.observer.all("deltas_published")
    assert [(upstream, count) for upstream, count, _, _ in reads] == [("default", n) for n in (1, 2, 1)]
    assert sum(size for _, _, size, _ in reads) == sum(record.size for record in bench.sink.records)  # type: ignore[misc]
    assert reads[0][3] is None
    assert reads[2][3] == 3
    event, job, upstream = bench.observer.all("job_ended")[0]
    assert read(bench.broker.records()[-1])["timing"] == {"queued": 40, "first_delta": 0, "total": 2000}
    assert (job.job_id, upstream, event.job_id) == ("job-1", "default", "job-1")  # type: ignore[attr-defined]
    assert summary(bench.broker.records()) == ["started job-1", "usage job-1"]


# Merging

MERGING = {"coalesce_s": 0.05}


def told(bench: Bench) -> list[str]:
    return [event["delta"].get("content", "") for event in events(bench.sink.records)]


async def test_execution_merges_text_that_comes_within_the_time(bench: Bench) -> None:
    """The first delta leaves at once; what comes later waits for no longer than it is told to, even if nothing comes."""
    bench.begin([word("a"), 1.0, word("b"), 0.04, word("c"), 20.0, word("d"), FINISH + DONE], tools=MERGING)
    began = asyncio.get_running_loop().time()
    times = []
    for text in ("a", "abc"):
        await until(lambda: bench.text == text, every_s=0.001)  # noqa: B023 - asked at once
        times.append(asyncio.get_running_loop().time() - began)
    terminal = await bench.end()

    assert told(bench) == ["a", "bc", "d", ""]
    assert times == pytest.approx([0, 1.05], abs=0.002)
    assert [event["seq"] for event in events(bench.sink.records)] == [1, 2, 3, 4]
    assert (terminal["seq"], terminal["observed"]["deltas"]) == (5, 5)
    assert outcome(terminal) == ("completed", None)
    published = [members for name, members in bench.observer.told if name == "deltas_published"]
    assert sum(members[1] for members in published) == 4  # type: ignore[misc]
    assert sum(members[2] for members in published) == sum(record.size for record in bench.sink.records)  # type: ignore[misc]


async def test_execution_merges_nothing_unless_told_to(bench: Bench) -> None:
    """Every delta of the upstream is an event."""
    await bench.play([word("a") + word("b"), word("c") + FINISH + DONE])
    assert told(bench) == ["a", "b", "c", ""]


@pytest.mark.parametrize(
    ("last", "end"),
    [
        (UpstreamError(JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "reset")), "interrupted"),
        (data(b'{"error":{"message":"m"}}'), "interrupted"),
        (data(b"x" * 3000), "interrupted"),
        (FINISH + DONE, "completed"),
        (b"", "interrupted"),
    ],
    ids=["broken", "error", "too long", "done", "truncated"],
)
async def test_execution_that_ends_while_text_is_held_publishes_it_first(
    bench: Bench, last: Step, end: str
) -> None:
    """Nothing that was said is missing before the terminal event, and no timer is left."""
    terminal = await bench.play(
        [word("a"), word("b"), word("c"), last], tools=MERGING | {"max_event_bytes": 2000}
    )

    assert told(bench)[:2] == ["a", "bc"]
    assert terminal["status"] == end
    assert terminal["seq"] == len(bench.sink.records) + 1
    assert terminal["observed"]["content_chars"] == 3
    await asyncio.sleep(1)
    assert terminal["seq"] == len(bench.sink.records) + 1


@pytest.mark.parametrize("grace_s", [0, 60])
async def test_execution_cancelled_while_text_is_held_publishes_it_first(bench: Bench, grace_s: int) -> None:
    """Whether the connection is closed at once or read on for the report."""
    script: list[Step] = [word("a"), word("b"), word("c"), 0.04, word("d") + FINISH + DONE]
    runner = bench.begin(script, tools=MERGING, policy={"cancel_grace_s": grace_s})
    await asyncio.sleep(0.03)
    assert bench.text == "a"
    runner.cancel("enough")
    terminal = await bench.end()

    assert told(bench) == ["a", "bc"]
    assert outcome(terminal) == ("cancelled", "cancelled")
    assert (terminal["seq"], terminal["observed"]["deltas"]) == (3, 3)


@pytest.mark.parametrize("ends", ["cancel", "grace", "deadline"])
async def test_execution_that_ends_while_held_text_finds_no_room_leaves_no_hole(
    bench: Bench, ends: str
) -> None:
    """What was held is published, what came after it is not: a reader has the beginning of the upstream's text."""
    call = data(chunk({"tool_calls": [{"index": 0}]}))
    script: list[Step] = [word("a"), word("b"), 0.01, call + word("c"), asyncio.Event()]
    deadline = {"deadline": NOW / 1000 + 3} if ends == "deadline" else {}
    policy = {"cancel_grace_s": 5 if ends == "grace" else 0}
    runner = bench.begin(script, tools=MERGING, policy=policy, **deadline)
    await until(lambda: bench.text == "a", every_s=0.001)
    bench.sink.keeping_up.clear()
    await asyncio.sleep(1)
    assert bench.text == "a"
    if ends != "deadline":
        runner.cancel("enough")
    if ends == "grace":
        bench.sink.keeping_up.set()
    terminal = await bench.end()

    assert told(bench) == ["a", "b"]
    assert terminal["status"] == ("expired" if ends == "deadline" else "cancelled")
    assert (terminal["seq"], terminal["observed"]["deltas"]) == (3, 2)


async def test_execution_held_text_is_a_sign_of_life(bench: Bench) -> None:
    """The idle timeout counts from when text came, not from when it left."""
    script: list[Step] = [word("a"), 0.8, word("b"), 0.9, word("c"), 0.9, FINISH + DONE]
    terminal = await bench.play(script, tools={"coalesce_s": 1.0}, policy={"idle_timeout_s": 1})
    assert told(bench) == ["a", "bc", ""]
    assert outcome(terminal) == ("completed", None)


async def test_execution_task_cancelled_while_text_is_held_writes_nothing_more(bench: Bench) -> None:
    """The partition has another owner: what is held goes nowhere, and no timer brings it back."""
    bench.begin([word("a"), word("b"), asyncio.Event()], tools=MERGING)
    await until(lambda: bench.text == "a", every_s=0.001)
    assert bench.task is not None
    bench.task.cancel()
    await asyncio.gather(bench.task, return_exceptions=True)
    await asyncio.sleep(1)
    assert told(bench) == ["a"]


async def test_execution_time_that_others_take_is_not_the_upstreams_silence(bench: Bench) -> None:
    """A large read is published over many turns of the loop, and each may last."""

    async def others() -> None:
        while True:
            asyncio.get_running_loop()._jumping.now += 0.4  # type: ignore[attr-defined]  # work, not waiting
            await asyncio.sleep(0)

    body = b"".join(word("x") for _ in range(10 * DELTAS_PER_TURN)) + FINISH + DONE
    bench.begin([word("x"), 0.1, body], policy={"idle_timeout_s": 1})
    await until(lambda: bench.sink.records)
    task = asyncio.create_task(others())
    terminal = await bench.end()
    task.cancel()

    assert outcome(terminal) == ("completed", None)
