"""One delivery of a job over its attempts: turns, slots, restarts, fallbacks."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.errors import UpstreamError
from streamworker.limits.estimate import TokenEstimate
from streamworker.model import Advice, Coordinates, ErrorCode, JobError, TopicPartition
from streamworker.testing import (
    MemoryClock,
    MemoryCommitStores,
    MemoryObserver,
    MemorySink,
    MemoryUpstream,
    Script,
)
from streamworker.worker.committer import PartitionCommitter
from streamworker.worker.delivery import Delivery, HeldTurn
from streamworker.worker.intake import Accepted
from tests.streams import NOW, data, make_job
from tests.turnable import quiet, until
from tests.unit.worker.bench import (
    FINISH,
    JOBS,
    events,
    make_policy,
    make_queues,
    make_tools,
    said,
    word,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Iterator
    from contextlib import AbstractAsyncContextManager

    from streamworker.limits.limiter import Slot
    from streamworker.testing import Step
    from streamworker.worker.queues import UpstreamQueues

BUSY = JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "busy", 503, retriable=True)
NO_KEY = JobError(ErrorCode.AUTH, "no such key", 401)
BAD = JobError(ErrorCode.UPSTREAM_REJECTED, "no such parameter", 400)
HALF = [word("half"), UpstreamError(BUSY)]


def refused(error: JobError) -> Script:
    """A call that is answered with an error."""
    return Script([], before=[UpstreamError(error)])


class Bench:
    """A job, and the upstreams that may serve it: `scripts` by name, in order."""

    def __init__(self, **scripts: Iterable[Script | Iterable[Step]]) -> None:
        self.upstreams = {name: MemoryUpstream(*calls) for name, calls in scripts.items()}
        self.observer = MemoryObserver()
        self.limits: dict[str, Any] = {"max_streams": 1, "circuit_failure_threshold": 3}
        self.queues = self.new_queues()
        self.sink = MemorySink()
        self.clock = MemoryClock(NOW)
        self.broker = MemoryCommitStores()
        self.committer = PartitionCommitter(
            JOBS, self.broker.store(JOBS), commit_id="me", lost=lambda _: None
        )
        self.tasks: list[asyncio.Task[None]] = []
        self.loop = asyncio.get_running_loop()

    async def open(self) -> None:
        await self.committer.open()
        self.committer.progress.begin(7)
        self.tasks.append(asyncio.create_task(self.committer.run()))

    def new_queues(self, **members: Any) -> UpstreamQueues:
        """Make the upstreams' queues anew, with these settings besides the usual ones."""
        given: dict[str, Any] = {"max_tries": 1, "max_restarts": 1, **self.limits, **members}
        self.queues = make_queues(
            self.observer,
            {name: make_policy(upstream, name=name, **given) for name, upstream in self.upstreams.items()},
        )
        return self.queues

    def delivery(self, turn: AbstractAsyncContextManager[None] | None = None, **members: Any) -> Delivery:
        job = make_job(source=Coordinates("jobs", 0, 7), **members)
        return Delivery(
            make_tools(self.sink, self.clock, self.observer, self.queues),
            Accepted(job, tuple(self.upstreams), TopicPartition("events", 2)),
            self.committer,
            cause="new",
            turn=turn or nullcontext(),
        )

    @contextmanager
    def held(self, slot: Slot) -> Iterator[Slot]:
        """Hold a slot of another job in a block."""
        try:
            yield slot
        finally:
            self.queues.release(slot)

    def begin(self, delivery: Delivery) -> asyncio.Task[None]:
        async def run() -> None:
            async with HeldTurn() as held:
                await delivery.run(held)

        self.tasks.append(asyncio.create_task(run()))
        return self.tasks[-1]

    async def play(self, **options: Any) -> dict[str, Any]:
        """Run the job to its end; return its terminal event."""
        await self.begin(self.delivery(**options))
        return self.written[-1]

    @property
    def written(self) -> list[dict[str, Any]]:
        return events(self.broker.records())

    @property
    def starts(self) -> list[tuple[str, str]]:
        return [(event["upstream"], event["cause"]) for event in self.written if event["type"] == "started"]

    @property
    def calls(self) -> dict[str, int]:
        return {name: len(upstream.calls) for name, upstream in self.upstreams.items()}

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.committer.close()
        assert self.queues.in_flight == 0
        assert all(not line.waiters for line in self.queues.queues.values())


@pytest.fixture
async def make() -> AsyncIterator[Any]:
    benches: list[Bench] = []

    async def make(**scripts: Any) -> Bench:
        benches.append(Bench(**scripts))
        await benches[-1].open()
        return benches[-1]

    yield make
    for bench in benches:
        await bench.close()


async def test_delivery_that_completes_is_one_attempt(make: Any) -> None:
    """The delivery count is committed with its `started`."""
    bench: Bench = await make(a=[said("well")])
    end = await bench.play()

    assert (end["status"], end["tries"], bench.starts) == ("completed", 1, [("a", "new")])
    assert not bench.broker.points[JOBS].offset < 8


async def test_delivery_whose_stream_broke_is_restarted_if_the_job_asks_for_it(make: Any) -> None:
    """The `started` of the new attempt voids the first one; tries are counted over both."""
    bench: Bench = await make(a=[HALF, said("all")])
    end = await bench.play(on_break="restart")

    assert (end["status"], end["tries"]) == ("completed", 2)
    assert bench.starts == [("a", "new"), ("a", "restart")]
    assert end["attempt"] == bench.written[-2]["attempt"] != bench.written[0]["attempt"]


async def test_delivery_restarts_at_most_max_restarts_times(make: Any) -> None:
    """The last attempt ends like any other."""
    bench: Bench = await make(a=[HALF])
    end = await bench.play(on_break="restart")

    assert (end["status"], bench.calls) == ("interrupted", {"a": 2})


async def test_delivery_whose_stream_broke_ends_without_restart_by_default(make: Any) -> None:
    """The first half is paid for, and the job does not ask for another one."""
    bench: Bench = await make(a=[HALF], b=[said("never")])
    end = await bench.play()

    assert (end["status"], bench.calls) == ("interrupted", {"a": 1, "b": 0})


@pytest.mark.parametrize("error", [BUSY, NO_KEY])
async def test_delivery_failed_by_an_upstream_continues_at_its_fallback(make: Any, error: JobError) -> None:
    """A new attempt begins at the fallback, and the observer is notified."""
    bench: Bench = await make(a=[refused(error)], b=[said("well")])
    end = await bench.play()

    assert (end["status"], end["tries"]) == ("completed", 2)
    assert bench.starts == [("a", "new"), ("b", "restart")]
    assert [arguments[1:] for arguments in bench.observer.all("fell_back")] == [("a", error)]


async def test_delivery_makes_all_tries_at_each_upstream(make: Any) -> None:
    """The error of the last upstream is the job's."""
    bench: Bench = await make(a=[refused(BUSY)], b=[refused(BAD)])
    bench.new_queues(max_tries=2)
    end = await bench.play()

    assert bench.calls == {"a": 2, "b": 1}
    assert (end["status"], end["tries"], end["error"]["code"]) == ("failed", 3, "upstream_rejected")


async def test_delivery_with_a_bad_request_does_not_fall_back(make: Any) -> None:
    """Another upstream would refuse the request too, or accept it wrongly."""
    bench: Bench = await make(a=[refused(BAD)], b=[said("never")])
    end = await bench.play()

    assert (end["status"], bench.calls) == ("failed", {"a": 1, "b": 0})


async def test_delivery_whose_circuit_opens_between_two_tries_falls_back_at_once(make: Any) -> None:
    """A job with a fallback does not wait for the probe."""
    bench: Bench = await make(a=[refused(BUSY)], b=[said("well")])
    bench.new_queues(max_tries=9)
    end = await bench.play()

    assert bench.calls == {"a": 3, "b": 1}
    assert end["status"] == "completed"


async def test_delivery_whose_circuit_opens_between_two_tries_waits_without_a_fallback(make: Any) -> None:
    """The job's next try is a probe."""
    bench: Bench = await make(a=[*[refused(BUSY)] * 3, said("well")])
    bench.new_queues(max_tries=9)
    began = bench.loop.time()
    end = await bench.play()

    assert (end["status"], end["tries"]) == ("completed", 4)
    assert bench.loop.time() - began >= 5


async def test_delivery_that_waited_too_long_for_a_circuit_fails_with_its_last_error(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait is bounded by `max_wait_s`; another job's probe hangs meanwhile."""
    monkeypatch.setattr("streamworker.worker.runner.random", lambda: 0.5)
    bench: Bench = await make(a=[refused(BUSY)])
    bench.new_queues(max_tries=9)
    task = bench.begin(bench.delivery())
    await until(lambda: bench.queues.queues["a"].limiter.is_open, every_s=0.001)
    began = bench.loop.time()
    with bench.held(
        await bench.queues.enter(["a"], make_job(), is_retry=True)
    ):  # it comes out of its backoff later
        await task

    end = bench.written[-1]
    assert (end["status"], end["tries"], end["error"]["message"]) == ("failed", 4, "busy")
    assert 55 <= bench.loop.time() - began <= 62


async def test_delivery_that_waited_too_long_before_its_first_call_fails_without_a_call(make: Any) -> None:
    """The error names what the job waited for."""
    bench: Bench = await make(a=[refused(BUSY)])
    while not bench.queues.queues["a"].limiter.is_open:
        with bench.held(await bench.queues.enter(["a"], make_job())) as slot:
            bench.queues.failed(slot, BUSY, "other")
    with bench.held(await bench.queues.enter(["a"], make_job())):  # the probe
        end = await bench.play()

    assert (end["status"], end["error"]["code"], end["tries"]) == ("failed", "upstream_unavailable", 0)
    assert end["error"]["message"].startswith("the job waited 60 s for the upstream a, which is unavailable")


async def test_delivery_whose_upstreams_are_all_down_waits_once(make: Any) -> None:
    """The wait is not repeated for each fallback."""
    bench: Bench = await make(a=[refused(BUSY)], b=[refused(BUSY)])
    for name in ("a", "b"):
        while not bench.queues.queues[name].limiter.is_open:
            with bench.held(await bench.queues.enter([name], make_job())) as slot:
                bench.queues.failed(slot, BUSY, "other")
    began = bench.loop.time()
    with (
        bench.held(await bench.queues.enter(["a"], make_job())),
        bench.held(await bench.queues.enter(["b"], make_job())),
    ):  # the probes
        end = await bench.play()

    assert (end["status"], end["tries"], len(bench.starts)) == ("failed", 0, 1)
    assert bench.loop.time() - began < 75


async def test_delivery_with_an_absurd_usage_report_completes(make: Any) -> None:
    """The report is passed through, and the job ends once."""
    report = b'{"choices":[],"usage":{"completion_tokens":1' + b"0" * 400 + b"}}"
    bench: Bench = await make(a=[[*said("well")[:-1], FINISH + data(report, b"[DONE]")]])
    end = await bench.play()

    assert (end["status"], end["usage"]["completion_tokens"]) == ("completed", 10**400)


async def test_delivery_whose_deadline_passes_in_the_queue_ends_without_a_call(make: Any) -> None:
    """The job ends `expired`, and no try was made."""
    bench: Bench = await make(a=[[1000.0]])
    slot = await bench.queues.enter(["a"], make_job())
    delivery = bench.delivery(deadline=NOW / 1000 + 10)
    began = bench.loop.time()
    assert delivery.is_waiting
    await bench.begin(delivery)
    bench.queues.release(slot)

    end = bench.written[-1]
    assert bench.loop.time() - began == pytest.approx(10, abs=0.01)
    assert (end["status"], end["error"]["code"], end["tries"]) == ("expired", "deadline", 0)
    assert (end["usage"], end["usage_source"]) == (None, "none")
    assert [event["type"] for event in bench.written] == ["started", "usage"]
    assert bench.calls == {"a": 0}


async def test_delivery_past_its_deadline_ends_at_once(make: Any) -> None:
    """The job does not wait for a slot."""
    bench: Bench = await make(a=[said("never")])
    slot = await bench.queues.enter(["a"], make_job())
    end = await bench.play(deadline=NOW / 1000 - 1)
    bench.queues.release(slot)

    assert (end["status"], bench.calls) == ("expired", {"a": 0})


async def test_delivery_cancelled_in_the_queue_ends_without_a_call(make: Any) -> None:
    """The job ends at once, wherever it stands in the queue."""
    bench: Bench = await make(a=[said("never")])
    slot = await bench.queues.enter(["a"], make_job())
    delivery = bench.delivery()
    task = bench.begin(delivery)
    await quiet()
    delivery.cancel("enough")
    await task
    bench.queues.release(slot)

    end = bench.written[-1]
    assert (end["status"], end["error"]["message"], end["tries"]) == ("cancelled", "enough", 0)


async def test_delivery_cancelled_before_its_turn_ends_without_it(make: Any) -> None:
    """The earlier jobs of its key go on."""
    bench: Bench = await make(a=[said("never")])
    turns: list[str] = []

    @asynccontextmanager
    async def turn() -> AsyncIterator[None]:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            turns.append("withdrawn")
            raise
        yield

    delivery = bench.delivery(turn())
    task = bench.begin(delivery)
    await quiet()
    delivery.cancel("enough")
    await task

    assert (bench.written[-1]["status"], turns) == ("cancelled", ["withdrawn"])


async def test_delivery_cancelled_between_two_tries_ends_at_once(make: Any) -> None:
    """A cancel record interrupts the backoff."""
    bench: Bench = await make(a=[refused(BUSY)])
    bench.new_queues(max_tries=9)
    delivery = bench.delivery()
    task = bench.begin(delivery)
    while not bench.observer.all("try_failed"):
        await quiet()
    began = bench.loop.time()
    delivery.cancel("enough")
    await task

    assert bench.loop.time() == pytest.approx(began, abs=0.01)
    assert bench.written[-1]["status"] == "cancelled"


async def test_delivery_between_two_tries_holds_no_slot(make: Any) -> None:
    """Another job uses the slot during the backoff."""
    bench: Bench = await make(a=[refused(BUSY), said("other"), said("well")])
    bench.new_queues(max_tries=2)
    first = bench.begin(bench.delivery(job_id="first"))
    while not bench.observer.all("try_failed"):
        await quiet()
    assert bench.queues.in_flight == 0
    with bench.held(await bench.queues.enter(["a"], make_job())):
        assert not first.done()
    await first

    assert bench.written[-1]["status"] == "completed"


async def test_delivery_holds_its_slot_until_the_terminal_commit_is_durable(make: Any) -> None:
    """A crash before that repeats a paid call, so the job counts as in flight; its upstream serves the next one."""
    bench: Bench = await make(a=[[gate := asyncio.Event(), *said("well")], said("other")])
    task = bench.begin(bench.delivery())
    await until(lambda: bench.calls["a"] == 1 and bench.starts)
    bench.broker.committing.clear()
    gate.set()
    await until(lambda: bench.upstreams["a"].open_calls == 0)
    await quiet()
    assert (bench.queues.in_flight, bench.queues.queues["a"].streams_open) == (1, 0)
    bench.broker.committing.set()
    await task

    assert bench.queues.in_flight == 0


@pytest.mark.parametrize(
    ("error", "is_kept"),
    [
        pytest.param(JobError(ErrorCode.RATE_LIMITED, "slow down", 429), False, id="refused"),
        pytest.param(JobError(ErrorCode.TIMEOUT_CONNECT, "no connection"), False, id="never reached"),
        pytest.param(BUSY, False, id="unavailable"),
        pytest.param(JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "hung up"), True, id="hung up"),
        pytest.param(JobError(ErrorCode.TIMEOUT_FIRST_DELTA, "silence"), True, id="silence"),
    ],
)
async def test_delivery_whose_call_may_have_cost_tokens_keeps_their_reservation(
    make: Any, error: JobError, is_kept: bool
) -> None:
    """A refused call cost nothing; an upstream that fell silent may have generated tokens."""
    bench: Bench = await make(a=[refused(error)])
    bench.new_queues(max_streams=10, tokens_per_minute=1000)
    await bench.play()

    assert (
        bench.queues.queues["a"].limiter.wait_s(TokenEstimate(900, 100), bench.loop.time()) > 0
    ) is is_kept


async def test_delivery_cancelled_with_grace_reads_the_usage_report(make: Any) -> None:
    """Nothing more is published; the terminal event has the upstream's report."""
    report = data(b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":9}}', b"[DONE]")
    bench: Bench = await make(a=[[word("one"), 1.0, word("two"), 1.0, report]])
    bench.new_queues(cancel_grace_s=10)
    delivery = bench.delivery()
    task = bench.begin(delivery)
    await asyncio.sleep(0.5)
    delivery.cancel("enough")
    delivery.cancel("enough")  # control records are read at least once
    await task

    end = bench.written[-1]
    assert (end["status"], end["usage_source"]) == ("cancelled", "upstream")
    assert end["usage"] == {"prompt_tokens": 3, "completion_tokens": 9}
    assert end["observed"]["deltas"] == len(bench.sink.records) == 1


async def test_delivery_cancelled_with_grace_is_cut_when_it_is_over(make: Any) -> None:
    """Usage is estimated from the published text if no report came in time."""
    bench: Bench = await make(a=[[word("word"), *[step for _ in range(100) for step in (1.0, word("more"))]]])
    bench.new_queues(cancel_grace_s=5)
    delivery = bench.delivery()
    task = bench.begin(delivery)
    await asyncio.sleep(0.5)
    began = bench.loop.time()
    delivery.cancel("enough")
    await task

    assert bench.loop.time() - began == pytest.approx(5, abs=0.01)
    end = bench.written[-1]
    assert (end["status"], end["usage_source"], end["usage"]) == (
        "cancelled",
        "estimated",
        {"completion_tokens": 1},
    )
    assert bench.upstreams["a"].open_calls == 0


NO_CREDIT = JobError(ErrorCode.QUOTA, "no credit", 402)
SLOW_DOWN = JobError(ErrorCode.RATE_LIMITED, "slow down", 429, retriable=True)


@pytest.mark.parametrize("error", [NO_KEY, BUSY, SLOW_DOWN])
async def test_delivery_waits_until_its_upstream_works_again(make: Any, error: JobError) -> None:
    """However many calls fail: they are counted in `tries`, and cost the job none of its `max_tries`."""
    bench: Bench = await make(a=[*[refused(error)] * 9, said("well")])
    bench.new_queues(max_tries=4, circuit_failure_threshold=1, max_wait_s=3600)
    end = await bench.play()

    assert (end["status"], end["tries"], bench.calls) == ("completed", 10, {"a": 10})
    assert len(bench.starts) == 1


async def test_delivery_refused_alone_for_its_prompt_fails_at_once(make: Any) -> None:
    """Nothing shows that the refusal concerns other jobs."""
    bench: Bench = await make(a=[refused(NO_CREDIT)])
    end = await bench.play()

    assert (end["status"], end["error"]["code"], end["tries"]) == ("failed", "quota", 1)


async def test_delivery_refused_among_others_is_called_once_more(make: Any) -> None:
    """The other job completes, so the refusal was the first one's own."""
    moderated = JobError(ErrorCode.AUTH, "not this prompt", 403)
    bench: Bench = await make(a=[refused(moderated)])
    bench.new_queues(max_streams=2)
    with bench.held(await bench.queues.enter(["a"], make_job())) as slot:
        task = bench.begin(bench.delivery())
        await until(lambda: bench.calls["a"] == 1)
        bench.queues.answered(slot)
        bench.queues.succeeded(slot)
        await task

    end = bench.written[-1]
    assert (end["status"], end["error"]["code"], end["tries"]) == ("failed", "auth", 2)


async def test_delivery_whose_429_is_permanent_fails_at_once(make: Any) -> None:
    """`x-should-retry: false` is the upstream's word."""
    bench: Bench = await make(a=[Script([], before=[UpstreamError(SLOW_DOWN, Advice(should_retry=False))])])
    bench.new_queues(max_tries=4)
    end = await bench.play()

    assert (end["status"], end["error"]["code"], end["tries"]) == ("failed", "rate_limited", 1)


async def test_delivery_limited_by_its_upstream_continues_at_a_fallback(make: Any) -> None:
    """A job with a fallback does not wait for a rate limit."""
    bench: Bench = await make(a=[refused(SLOW_DOWN)], b=[said("well")])
    began = bench.loop.time()
    end = await bench.play()

    assert (end["status"], bench.calls, bench.loop.time() - began) == ("completed", {"a": 1, "b": 1}, 0)


async def test_delivery_whose_deadline_passes_in_a_hold_names_the_upstream(make: Any) -> None:
    """The error says what the job waited for."""
    bench: Bench = await make(a=[refused(NO_KEY)])
    bench.new_queues(max_wait_s=3600)
    began = bench.loop.time()
    bench.clock.now_ms = lambda: NOW + round(1000 * (bench.loop.time() - began))  # type: ignore[method-assign]
    end = await bench.play(deadline=NOW / 1000 + 60)

    assert (end["status"], end["error"]["code"]) == ("expired", "deadline")
    assert end["error"]["message"] == (
        "the job's deadline passed while it waited for the upstream a, which refuses the API key"
    )


def reporting(*words: str, tokens: int) -> list[Step]:
    """A stream that reports its usage as it goes."""
    usage = {"completion_tokens": tokens, "details": {"cached": 1}, "note": "x"}
    return [*map(word, words), data({"choices": [], "usage": usage})]


async def test_delivery_reports_the_usage_of_its_voided_calls(make: Any) -> None:
    """Failed tries and restarted attempts are paid for too; their reports are added up member by member."""
    failed = [*reporting(tokens=5), UpstreamError(BUSY)]
    broken = [*reporting("half", tokens=7), UpstreamError(BUSY)]
    bench: Bench = await make(a=[failed, broken, said("all")])
    bench.new_queues(max_tries=2)
    end = await bench.play(on_break="restart")

    assert (end["status"], end["tries"]) == ("completed", 3)
    assert end["voided"] == {"calls": 2, "usage": {"completion_tokens": 12, "details": {"cached": 2}}}


async def test_delivery_without_voided_calls_has_no_such_member(make: Any) -> None:
    """A failed try without a report is not counted."""
    bench: Bench = await make(a=[refused(BUSY), said("well")])
    bench.new_queues(max_tries=2)

    assert "voided" not in await bench.play()


async def test_held_turn_is_left_at_its_end_and_not_by_later_turns() -> None:
    """A job that is delivered again has its turn already; the turn of the first delivery is the one to leave."""
    calls: list[str] = []

    @asynccontextmanager
    async def turn(name: str) -> AsyncIterator[None]:
        calls.append(f"enter {name}")
        try:
            yield
        finally:
            calls.append(f"leave {name}")

    with pytest.raises(ZeroDivisionError):
        async with HeldTurn() as held:
            await held.enter(turn("first"))
            await held.enter(nullcontext())
            assert calls == ["enter first"]
            raise ZeroDivisionError

    assert calls == ["enter first", "leave first"]


async def test_held_turn_that_was_never_entered_leaves_nothing() -> None:
    """The wait for the turn may be cancelled, or fail."""

    @asynccontextmanager
    async def turn(reason: str) -> AsyncIterator[None]:
        if reason:
            raise ValueError(reason)
        yield

    async with HeldTurn() as held:
        with pytest.raises(ValueError, match="no turn"):
            await held.enter(turn("no turn"))
