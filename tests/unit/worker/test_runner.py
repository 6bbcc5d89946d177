"""One attempt from its `started` to the terminal event, with upstream, sink and broker in memory."""

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
from streamworker.worker.committer import STALLED_S, PartitionCommitter
from streamworker.worker.usual import DELTAS_PER_TURN
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
    """One job with its committer; `written` is what the committer wrote, `sink.records` what was published."""

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


async def test_runner_complete_stream_ends_completed(bench: Bench) -> None:
    """Events are numbered without a gap, in one partition, under the job's key."""
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


async def test_runner_calls_the_upstream_with_the_request_and_its_trace(bench: Bench) -> None:
    """The request is sent with streaming turned on; of the record's headers only the trace's are sent."""
    await bench.play(said("a"), trace=(("traceparent", b"00-1-2-01"), ("tracestate", b"\xff")))

    (call,) = bench.upstream.calls
    assert json.loads(call.body) == {"model": "m", "stream": True, "stream_options": {"include_usage": True}}
    assert call.headers == {"traceparent": "00-1-2-01"}


@pytest.mark.parametrize("value", [b"00-1\r\nx-injected: 1", b"00-1\0", b"\x7f"])
async def test_runner_trace_that_is_not_a_valid_header_is_left_out(bench: Bench, value: bytes) -> None:
    """A record header cannot add an HTTP header, and cannot make the call fail."""
    await bench.play(said("a"), trace=(("traceparent", value),))

    assert bench.upstream.calls[0].headers == {}


async def test_runner_calls_the_upstream_before_started_is_written(bench: Bench) -> None:
    """The call and the commit of `started` run side by side."""
    bench.broker.committing.clear()
    bench.begin(said("one"))
    await quiet()

    assert bench.upstream.open_calls == 1
    assert bench.broker.records() == []


async def test_runner_deltas_wait_for_started(bench: Bench) -> None:
    """A reader sees `started` before any delta of the attempt; nothing more is read meanwhile."""
    bench.broker.committing.clear()
    bench.begin(said("one ", "two ", "three"))
    await asyncio.sleep(1000)
    assert bench.sink.records == []
    assert bench.upstream.calls[0].reads == 1
    bench.broker.committing.set()
    terminal = await bench.end()

    assert bench.text == "one two three"
    assert outcome(terminal) == ("completed", None)


async def test_runner_terminal_event_waits_for_all_acknowledgements(bench: Bench) -> None:
    """The offset is committed with the terminal event, not before."""
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


async def test_runner_closes_the_connection_before_it_waits_for_acknowledgements(bench: Bench) -> None:
    """A slow broker keeps no upstream connection open."""
    bench.sink.acknowledges = False
    bench.begin(said("one"))
    await quiet()

    assert bench.upstream.open_calls == 0


async def test_runner_returns_once_the_terminal_event_is_durable(bench: Bench) -> None:
    """`job_ended` is not reported before that."""
    bench.begin([word("one"), gate := asyncio.Event(), FINISH, DONE])
    await until(lambda: bench.written == ["started"])
    bench.broker.committing.clear()
    gate.set()
    await asyncio.sleep(100)
    assert bench.observer.all("job_ended") == []
    bench.broker.committing.set()
    await bench.end()

    assert len(bench.observer.all("job_ended")) == 1


async def test_runner_without_room_in_the_sink_does_not_read_the_socket(bench: Bench) -> None:
    """Backpressure reaches the upstream, and no timeout counts the wait."""
    bench.begin(said(*"abcdefgh"), policy={"idle_timeout_s": 5, "first_delta_timeout_s": 5})
    bench.sink.keeping_up.clear()
    await asyncio.sleep(3600)
    assert bench.upstream.calls[0].reads == 1
    assert bench.sink.records == []
    bench.sink.keeping_up.set()
    terminal = await bench.end()

    assert bench.text == "abcdefgh"
    assert outcome(terminal) == ("completed", None)


async def test_runner_exception_in_the_read_callback_ends_the_attempt(bench: Bench) -> None:
    """The event loop would only log it, and the job would wait for its idle timeout."""

    def fail(*_: object) -> None:
        raise ArithmeticError("a bug")

    bench.observer.deltas_published = fail  # type: ignore[method-assign,assignment]
    bench.begin(said("a", "b"))
    with pytest.raises(ArithmeticError, match="a bug"):
        await bench.end()

    assert bench.upstream.open_calls == 0


async def test_runner_exception_after_the_stream_ended_is_not_lost(bench: Bench) -> None:
    """The read that ends the stream may be the one that fails."""

    def fail(*_: object) -> None:
        raise ArithmeticError("a bug")

    bench.observer.deltas_published = fail  # type: ignore[method-assign,assignment]
    bench.begin([word("a") + FINISH + DONE])
    with pytest.raises(ArithmeticError, match="a bug"):
        await bench.end()


async def test_runner_checks_for_room_before_each_delta(bench: Bench) -> None:
    """One read may hold more deltas than the sink has room for."""
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


async def test_runner_large_read_lets_other_tasks_run(bench: Bench) -> None:
    """One read with thousands of deltas does not block the loop."""
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


async def test_runner_usual_reads_of_one_and_of_several_chunks_are_published_in_order(bench: Bench) -> None:
    """A loop that is late receives several chunks in one read; the observer gets one report per read."""
    bench.begin(
        [word("a"), word("b"), word("c"), word("d") + word("e") + word("f"), word("g"), FINISH + DONE]
    )
    terminal = await bench.end()

    assert outcome(terminal) == ("completed", None)
    assert bench.text == "abcdefg"
    assert terminal["seq"] == 9  # seven texts, and the finish reason
    assert terminal["observed"]["deltas"] == 8
    reads = bench.observer.all("deltas_published")
    assert [count for _, count, _, _ in reads] == [1, 1, 1, 3, 1, 1]
    sizes: list[Any] = [size for _, _, size, _ in reads]
    assert sizes[1:5] == [sizes[1], sizes[1], 3 * sizes[1], sizes[1]]


async def test_runner_usual_read_waits_while_the_sink_has_no_room(bench: Bench) -> None:
    """As any other read does: the socket is not read meanwhile, and nothing is lost."""
    bench.begin([word("a"), word("b"), 1.0, word("c"), word("d"), FINISH + DONE])
    while bench.text != "ab":  # noqa: ASYNC110 - a turn of the loop at a time
        await asyncio.sleep(0)
    bench.sink.keeping_up.clear()
    await asyncio.sleep(5)
    assert bench.text == "ab"
    bench.sink.keeping_up.set()
    terminal = await bench.end()

    assert outcome(terminal) == ("completed", None)
    assert bench.text == "abcd"


async def test_runner_cancelled_inside_a_large_read_ends_after_the_published_deltas(bench: Bench) -> None:
    """A delta that was not published yet gives its `seq` to the terminal event."""
    runner = bench.begin([word("x") * 3 * DELTAS_PER_TURN, asyncio.Event()])
    while not bench.text:  # noqa: ASYNC110 - a turn of the loop at a time
        await asyncio.sleep(0)
    runner.cancel("enough")
    terminal = await bench.end()

    assert outcome(terminal) == ("cancelled", "cancelled")
    assert len(bench.text) < 3 * DELTAS_PER_TURN
    assert terminal["seq"] == len(bench.text) + 1
    assert terminal["observed"]["deltas"] == len(bench.text)


async def test_runner_cancelled_with_grace_while_there_is_no_room_counts_the_delta_that_waits(
    bench: Bench,
) -> None:
    """The waiting delta is published when there is room; the terminal event follows it."""
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


async def test_runner_cancelled_while_there_is_no_room_ends_cancelled(bench: Bench) -> None:
    """The delta that found no room has no `seq`."""
    runner = bench.begin([word("a"), asyncio.Event()])
    bench.sink.keeping_up.clear()
    await asyncio.sleep(60)
    runner.cancel("enough")
    terminal = await bench.end()

    assert outcome(terminal) == ("cancelled", "cancelled")
    assert bench.upstream.open_calls == 0
    assert terminal["seq"] == 1 + len(bench.sink.records)


async def test_runner_without_first_delta_fails_at_the_first_delta_timeout(bench: Bench) -> None:
    """The timeout runs from the call; pings do not extend it."""
    began = asyncio.get_running_loop().time()
    terminal = await bench.play(Script([20.0, PING, 20.0, PING, asyncio.Event()], before=[15.0]))

    assert outcome(terminal) == ("failed", "timeout_first_delta")
    assert terminal["error"]["retriable"]
    assert round(asyncio.get_running_loop().time() - began) == 60
    assert bench.upstream.open_calls == 0


async def test_runner_without_answer_fails_at_the_first_delta_timeout(bench: Bench) -> None:
    """An upstream that accepts the call and never answers is not an exception."""
    terminal = await bench.play(Script([], before=[asyncio.Event()]))

    assert outcome(terminal) == ("failed", "timeout_first_delta")
    assert terminal["tries"] == 1


async def test_runner_silent_after_a_delta_ends_interrupted(bench: Bench) -> None:
    """The published text stays, and its usage is estimated."""
    terminal = await bench.play([word("one"), asyncio.Event()])

    assert outcome(terminal) == ("interrupted", "timeout_idle")
    assert terminal["usage_source"] == "estimated"
    assert bench.text == "one"
    assert bench.upstream.open_calls == 0


async def test_runner_pings_do_not_restart_the_idle_timeout(bench: Bench) -> None:
    """Comments show an open connection, not a generating upstream."""
    pings: list[Step] = [word("one"), *[step for _ in range(1000) for step in (10.0, PING)]]
    began = asyncio.get_running_loop().time()
    terminal = await bench.play(pings)

    assert outcome(terminal) == ("interrupted", "timeout_idle")
    assert round(asyncio.get_running_loop().time() - began) == 30


async def test_runner_slow_and_steady_stream_completes(bench: Bench) -> None:
    """Each delta restarts the idle timeout."""
    script: list[Step] = []
    for _ in range(150):
        script += [29.0, word("x")]
    terminal = await bench.play([*script, FINISH, DONE])

    assert outcome(terminal) == ("completed", None)
    assert bench.text == "x" * 150


async def test_runner_past_the_deadline_expires_without_a_call(bench: Bench) -> None:
    """Only `started` and the terminal event are written."""
    terminal = await bench.play(said("one"), deadline=NOW / 1000 - 1)

    assert outcome(terminal) == ("expired", "deadline")
    assert terminal["tries"] == 0
    assert bench.upstream.calls == []
    assert bench.written == ["started", "usage"]


async def test_runner_at_the_deadline_expires_in_the_stream(bench: Bench) -> None:
    """Deltas do not extend the deadline."""
    began = asyncio.get_running_loop().time()
    steady: list[Step] = [step for _ in range(1000) for step in (word("x"), 0.9)]
    terminal = await bench.play(steady, deadline=NOW / 1000 + 5)

    assert outcome(terminal) == ("expired", "deadline")
    assert round(asyncio.get_running_loop().time() - began) == 5
    assert bench.text == "x" * 6
    assert terminal["seq"] == 7
    assert bench.upstream.open_calls == 0


@pytest.mark.parametrize("script", [Script([], before=[asyncio.Event()]), [asyncio.Event()]])
async def test_runner_cancelled_before_a_delta_ends_cancelled(bench: Bench, script: Any) -> None:
    """It makes no difference whether the upstream has answered."""
    runner = bench.begin(script)
    await quiet()
    runner.cancel("the user has gone")
    terminal = await bench.end()

    assert outcome(terminal) == ("cancelled", "cancelled")
    assert terminal["error"]["message"] == "the user has gone"
    assert (terminal["usage"], terminal["usage_source"]) == (None, "none")
    assert bench.upstream.open_calls == 0


async def test_runner_cancelled_in_the_stream_keeps_its_deltas(bench: Bench) -> None:
    """The terminal event follows the last delta."""
    runner = bench.begin([word("one"), asyncio.Event()])
    await until(lambda: bench.text == "one")
    runner.cancel("")
    terminal = await bench.end()

    assert outcome(terminal) == ("cancelled", "cancelled")
    assert terminal["error"]["message"] == "cancelled"
    assert terminal["seq"] == 2


async def test_runner_cancelled_after_the_stream_ended_completes(bench: Bench) -> None:
    """The end was first."""
    bench.sink.acknowledges = False
    runner = bench.begin(said("one"))
    await quiet()
    runner.cancel("too late")
    bench.sink.acknowledge()

    assert outcome(await bench.end()) == ("completed", None)


async def test_runner_refused_by_the_upstream_fails_with_its_error(bench: Bench) -> None:
    """Secrets are removed from the error's text."""
    error = JobError(ErrorCode.AUTH, "wrong key sk-secret", 403, '{"key":"sk-secret"}')
    terminal = await bench.play(Script([], before=[UpstreamError(error)]))

    assert outcome(terminal) == ("failed", "auth")
    assert terminal["error"]["message"] == "wrong key ***"
    assert terminal["error"]["upstream"] == '{"key":"***"}'
    assert terminal["seq"] == 1


@pytest.mark.parametrize(
    ("before", "expected"), [([], ("failed", "truncated")), ([word("one")], ("interrupted", "truncated"))]
)
async def test_runner_broken_stream_ends_failed_or_interrupted(
    bench: Bench, before: list[bytes], expected: tuple[str, str]
) -> None:
    """Without a delta the job failed, with one it was interrupted."""
    error = JobError(ErrorCode.TRUNCATED, "reset", 200, retriable=True)

    assert outcome(await bench.play([*before, UpstreamError(error)])) == expected


async def test_runner_broken_after_the_finish_reason_completes(bench: Bench) -> None:
    """Nothing is missing, however the connection ended."""
    error = JobError(ErrorCode.TRUNCATED, "reset", 200, retriable=True)

    assert outcome(await bench.play([word("one"), FINISH, UpstreamError(error)])) == ("completed", None)


async def test_runner_body_that_ends_without_done_is_truncated(bench: Bench) -> None:
    """A regular end of the body does not end the stream by itself."""
    assert outcome(await bench.play([word("one")])) == ("interrupted", "truncated")


async def test_runner_failed_stream_is_closed_at_once(bench: Bench) -> None:
    """Closing the connection stops the upstream's generation."""
    frame = data({"error": {"message": "no"}})
    terminal = await bench.play([word("one") + frame, asyncio.Event()])

    assert outcome(terminal) == ("interrupted", "upstream_error")
    assert not bench.upstream.calls[0].is_drained
    assert bench.upstream.open_calls == 0


async def test_runner_delta_over_the_record_limit_ends_the_job_before_it(bench: Bench) -> None:
    """The terminal event has the delta's `seq`, and the connection is closed."""
    script: list[Step] = [word("one ") + word("x" * 20_000) + word("never"), asyncio.Event()]
    terminal = await bench.play(script, tools={"max_record_bytes": 16_384})

    assert outcome(terminal) == ("interrupted", "too_large")
    assert bench.text == "one "
    assert terminal["seq"] == 2
    assert terminal["observed"]["deltas"] == 1
    assert bench.upstream.open_calls == 0


async def test_runner_first_delta_over_the_record_limit_fails(bench: Bench) -> None:
    """No delta was published."""
    terminal = await bench.play([word("x" * 20_000)], tools={"max_record_bytes": 16_384})

    assert outcome(terminal) == ("failed", "too_large")
    assert terminal["seq"] == 1


async def test_runner_delta_that_the_broker_refuses_interrupts_the_job(bench: Bench) -> None:
    """Readers miss it, so the job is not complete; its `seq` stays used."""
    bench.sink.acknowledges = False
    bench.begin(said("one ", "two"))
    await quiet()
    bench.sink.acknowledge(RecordTooLarge("the topic takes less"))
    terminal = await bench.end()

    assert outcome(terminal) == ("interrupted", "too_large")
    assert terminal["seq"] == 4


async def test_runner_usage_report_over_the_record_limit_is_left_out(bench: Bench) -> None:
    """The broker would refuse the terminal event forever, and the partition's other commits with it."""
    bench.broker.max_record_bytes = 16_384
    report = data(chunk({}, "stop", usage={"completion_tokens": 1, "note": "x" * 20_000}))
    terminal = await bench.play([word("one"), report, DONE], tools={"max_record_bytes": 16_384})

    assert outcome(terminal) == ("interrupted", "too_large")
    assert (terminal["usage"], terminal["usage_source"]) == (None, "none")
    assert terminal["seq"] == 3


async def test_runner_server_sent_event_over_the_limit_is_a_protocol_error(bench: Bench) -> None:
    """Memory is bounded whatever the upstream sends."""
    terminal = await bench.play(
        [word("one"), b"data: " + b"x" * 3000, asyncio.Event()], tools={"max_event_bytes": 2048}
    )

    assert outcome(terminal) == ("interrupted", "upstream_protocol")
    assert bench.upstream.open_calls == 0


@pytest.mark.parametrize("script", [Script([], before=[asyncio.Event()]), [word("one"), asyncio.Event()]])
async def test_runner_task_cancelled_closes_the_call_and_writes_nothing_more(
    bench: Bench, script: Any
) -> None:
    """The next owner runs the job again; this worker writes no terminal event."""
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


async def test_runner_notifies_the_observer(bench: Bench) -> None:
    """The start, the first delta once, every read, and the end."""
    bench.begin([word("a"), gate := asyncio.Event(), word("b") + word("c"), 3.0, FINISH + DONE])
    await until(lambda: bench.text == "a")
    bench.clock.turn(2)
    gate.set()
    await bench.end()

    assert [name for name, _ in bench.observer.calls] == [
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


async def test_runner_merges_text_that_arrives_within_coalesce_s(bench: Bench) -> None:
    """The first delta is published at once; later text waits at most `coalesce_s`."""
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
    published = [members for name, members in bench.observer.calls if name == "deltas_published"]
    assert sum(members[1] for members in published) == 4  # type: ignore[misc]
    assert sum(members[2] for members in published) == sum(record.size for record in bench.sink.records)  # type: ignore[misc]


async def test_runner_merges_nothing_by_default(bench: Bench) -> None:
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
async def test_runner_that_ends_while_text_is_held_publishes_it_first(
    bench: Bench, last: Step, end: str
) -> None:
    """No text is missing before the terminal event, and no timer is left."""
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
async def test_runner_cancelled_while_text_is_held_publishes_it_first(bench: Bench, grace_s: int) -> None:
    """With and without grace."""
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
async def test_runner_that_ends_while_held_text_finds_no_room_leaves_no_gap(bench: Bench, ends: str) -> None:
    """The held text is published, later deltas are not: readers have a beginning of the upstream's text."""
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


MERGED = {"deltas": "merged"}


async def test_runner_job_with_merged_deltas_publishes_text_at_the_end(bench: Bench) -> None:
    """However long the stream takes; the first delta is published at once."""
    bench.begin([word("a"), 5.0, word("b"), 20.0, word("c"), word("d"), FINISH + DONE], **MERGED)
    await asyncio.sleep(24)
    assert told(bench) == ["a"]
    terminal = await bench.end()

    assert told(bench) == ["a", "bcd", ""]
    assert (terminal["seq"], terminal["observed"]["deltas"]) == (4, 5)
    assert outcome(terminal) == ("completed", None)


async def test_runner_merged_text_is_published_when_a_hold_is_full(bench: Bench) -> None:
    """No record exceeds the limit, even where every character is escaped."""
    words = ["\x01" * 1000] * 40
    await bench.play(said(*words), tools={"max_record_bytes": 16_384}, **MERGED)

    assert bench.text == "".join(words)
    assert 10 < len(bench.sink.records) < 30
    assert max(record.size for record in bench.sink.records) <= 16_384


@pytest.mark.parametrize("grace_s", [0, 60])
async def test_runner_cancelled_while_merged_text_is_held_publishes_it_first(
    bench: Bench, grace_s: int
) -> None:
    """No timer is set for it, with and without grace."""
    script: list[Step] = [word("a"), word("b"), word("c"), 0.04, word("d") + FINISH + DONE]
    runner = bench.begin(script, policy={"cancel_grace_s": grace_s}, **MERGED)
    await asyncio.sleep(0.03)
    assert bench.text == "a"
    runner.cancel("enough")
    terminal = await bench.end()

    assert told(bench) == ["a", "bc"]
    assert outcome(terminal) == ("cancelled", "cancelled")
    assert (terminal["seq"], terminal["observed"]["deltas"]) == (3, 3)


@pytest.mark.parametrize("ends", ["cancel", "grace"])
async def test_runner_cancelled_while_merged_text_finds_no_room_leaves_no_gap(
    bench: Bench, ends: str
) -> None:
    """The held text is published once, and the delta behind it is not."""
    call = data(chunk({"tool_calls": [{"index": 0}]}))
    script: list[Step] = [word("a"), word("b"), 1.0, call + word("c"), asyncio.Event()]
    runner = bench.begin(script, policy={"cancel_grace_s": 5 if ends == "grace" else 0}, **MERGED)
    await until(lambda: bench.text == "a", every_s=0.001)
    bench.sink.keeping_up.clear()
    await asyncio.sleep(2)
    runner.cancel("enough")
    if ends == "grace":
        bench.sink.keeping_up.set()
    terminal = await bench.end()

    assert told(bench) == ["a", "b"]
    assert (terminal["status"], terminal["seq"], terminal["observed"]["deltas"]) == ("cancelled", 3, 2)


async def test_runner_merged_text_restarts_the_idle_timeout(bench: Bench) -> None:
    """Text that is held shows that the upstream generates."""
    script: list[Step] = [word("a")]
    for _ in range(5):
        script += [0.9, word("b")]
    script += [0.9, FINISH + DONE]
    terminal = await bench.play(script, policy={"idle_timeout_s": 1}, **MERGED)
    assert told(bench) == ["a", "bbbbb", ""]
    assert outcome(terminal) == ("completed", None)


async def test_runner_held_text_restarts_the_idle_timeout(bench: Bench) -> None:
    """The timeout runs from the arrival of text, not from its publication."""
    script: list[Step] = [word("a"), 0.8, word("b"), 0.9, word("c"), 0.9, FINISH + DONE]
    terminal = await bench.play(script, tools={"coalesce_s": 1.0}, policy={"idle_timeout_s": 1})
    assert told(bench) == ["a", "bc", ""]
    assert outcome(terminal) == ("completed", None)


async def test_runner_task_cancelled_while_text_is_held_writes_nothing_more(bench: Bench) -> None:
    """The partition has another owner; no timer publishes the held text."""
    bench.begin([word("a"), word("b"), asyncio.Event()], tools=MERGING)
    await until(lambda: bench.text == "a", every_s=0.001)
    assert bench.task is not None
    bench.task.cancel()
    await asyncio.gather(bench.task, return_exceptions=True)
    await asyncio.sleep(1)
    assert told(bench) == ["a"]


async def test_runner_time_of_other_tasks_does_not_count_as_silence(bench: Bench) -> None:
    """A large read is published over many turns of the loop, and each may take long."""

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


async def test_runner_that_waited_for_a_slot_makes_no_call_while_commits_fail(bench: Bench) -> None:
    """The slot is released for a partition whose commits succeed; the job is called when its own succeed again."""
    runner = bench.runner([FINISH, DONE], policy={"max_streams": 1})
    queues = runner.runner._queues
    other = await queues.enter(["default"], make_job())
    bench.task = asyncio.create_task(runner.play())
    await quiet()
    bench.broker.committing.clear()
    bench.committer.touch()
    await asyncio.sleep(STALLED_S + 1)
    assert bench.committer.is_stalled
    queues.release(other)
    await quiet()

    assert (bench.upstream.calls, queues.in_flight) == ([], 0)
    bench.broker.committing.set()
    terminal = await bench.end()
    assert (terminal["status"], len(bench.upstream.calls)) == ("completed", 1)
