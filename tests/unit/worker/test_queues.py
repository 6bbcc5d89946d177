"""Waiting lines before the upstreams."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from streamworker.errors import UpstreamError
from streamworker.model import ErrorCode, JobError
from streamworker.testing import MemoryObserver
from tests.streams import make_job
from tests.turnable import quiet
from tests.unit.worker.bench import make_policies, make_queues

if TYPE_CHECKING:
    from streamworker.limits.limiter import Slot
    from streamworker.model import Job
    from streamworker.worker.queues import UpstreamQueues

DOWN = JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "the prompt was: secret", 503, retriable=True)
BUSY = JobError(ErrorCode.RATE_LIMITED, "slow down", 429, retriable=True)
JOB = make_job()


def two(observer: MemoryObserver | None = None, *, max_wait_s: float = 60, **options: Any) -> UpstreamQueues:
    """Two upstreams that take two streams each and are thought dead after two failures."""
    policies = make_policies("a", "b", max_streams=2, circuit_failure_threshold=2, max_wait_s=max_wait_s)
    return make_queues(observer or MemoryObserver(), policies, **options)


def one(**members: Any) -> UpstreamQueues:
    """One upstream with these settings."""
    return make_queues(MemoryObserver(), make_policies("a", **members))


def sized(tokens: int) -> Job:
    """A job whose completion may have so many tokens."""
    return msgspec.structs.replace(JOB, request={"max_tokens": msgspec.Raw(str(tokens).encode())})


async def take(queues: UpstreamQueues, *upstreams: str, **options: Any) -> Slot:
    """Take a permit that is to be had at once."""
    async with asyncio.timeout(0.0005):
        return await queues.enter(upstreams, JOB, **options)


async def kill(queues: UpstreamQueues, upstream: str) -> None:
    """Let calls fail until the upstream is thought dead."""
    while not queues.queues[upstream].limiter.is_open:
        slot = await take(queues, upstream)
        queues.failed(slot, DOWN)
        queues.release(slot)


async def enter_later(queues: UpstreamQueues, *upstreams: str, **options: Any) -> asyncio.Task[Slot]:
    task = asyncio.create_task(queues.enter(upstreams, JOB, **options))
    await quiet()
    return task


async def test_gates_let_through_as_many_as_fit_and_the_next_when_one_leaves() -> None:
    """In the order in which they came."""
    queues = two()
    first = [await take(queues, "a"), await take(queues, "a")]
    waiting = [await enter_later(queues, "a") for _ in range(3)]
    assert [task.done() for task in waiting] == [False] * 3
    queues.release(first[0])
    await quiet()
    assert [task.done() for task in waiting] == [True, False, False]
    queues.release(await waiting[0])
    queues.release(first[1])
    await quiet()

    assert [task.done() for task in waiting] == [True] * 3
    assert queues.in_flight == 2


async def test_gates_of_a_full_upstream_hold_nobody_else_back() -> None:
    """Each has its own line."""
    queues = two()
    for _ in range(2):
        await take(queues, "a")
    waiting = await enter_later(queues, "a")
    slot = await take(queues, "b")

    assert slot.upstream == "b"
    assert not waiting.done()
    assert queues.states()["a"] == {
        "circuit": "closed",
        "streams_open": 2,
        "streams_limit": 2,
        "jobs_waiting": 1,
    }


async def test_gates_bound_the_calls_of_the_whole_process() -> None:
    """When one leaves, the lines take turns."""
    queues = two(max_in_flight=2)
    slots = [await take(queues, "a"), await take(queues, "b")]
    waiting = {name: [await enter_later(queues, name) for _ in range(4)] for name in ("a", "b")}
    for _ in range(4):
        queues.release(slots.pop(0))
        await quiet()
        slots += [
            task.result()
            for tasks in waiting.values()
            for task in tasks
            if task.done() and task.result() not in slots and task.result().is_open
        ]
        assert queues.in_flight == 2

    done = [sum(task.done() for task in tasks) for tasks in waiting.values()]
    assert sum(done) == 4
    assert min(done) >= 1


async def test_gates_retry_goes_before_first_calls() -> None:
    """It has been waiting for longer."""
    queues = one(max_streams=1)
    slot = await take(queues, "a")
    newcomer = await enter_later(queues, "a")
    retries = [await enter_later(queues, "a", is_retry=True) for _ in range(2)]
    queues.release(slot)
    await quiet()
    assert [task.done() for task in (*retries, newcomer)] == [True, False, False]
    queues.release(await retries[0])
    await quiet()

    assert [task.done() for task in (*retries, newcomer)] == [True, True, False]


async def test_gates_waiting_that_is_cancelled_leaves_its_place() -> None:
    """The next one is not held up by it."""
    queues = one(max_streams=1)
    slot = await take(queues, "a")
    gone, stays = await enter_later(queues, "a"), await enter_later(queues, "a")
    gone.cancel()
    queues.release(slot)
    await quiet()

    assert gone.cancelled()
    assert stays.done()
    assert queues.in_flight == 1


async def test_gates_permit_that_comes_in_the_moment_of_the_cancellation_is_given_back() -> None:
    """Or it would be lost for ever."""
    queues = one(max_streams=1)
    slot = await take(queues, "a")
    waiting = await enter_later(queues, "a")
    queues.release(slot)
    waiting.cancel()
    await quiet()

    assert waiting.cancelled()
    assert queues.in_flight == 0
    await take(queues, "a")


async def test_gates_released_twice_is_released_once() -> None:
    """Leaving the block comes after an early release."""
    queues = two()
    slot = await take(queues, "a")
    queues.release(slot)
    queues.release(slot)
    queues.failed(slot, DOWN)
    queues.succeeded(slot)

    assert queues.in_flight == 0
    assert queues.queues["a"].streams_open == 0


async def test_gates_limit_per_minute_lets_go_on_when_the_minute_is_over() -> None:
    """Nobody has to leave for that."""
    queues = one(requests_per_minute=2)
    loop = asyncio.get_running_loop()
    began = loop.time()
    for _ in range(5):
        queues.release(await queues.enter(["a"], JOB))

    assert loop.time() - began == pytest.approx(122, abs=0.1)


async def test_gates_after_429_open_fewer_streams_and_recover() -> None:
    """Additive increase: who waits goes on when there is room again."""
    queues = one(max_streams=10)
    slots = [await take(queues, "a") for _ in range(10)]
    await asyncio.sleep(0.1)
    queues.failed(slots[0], BUSY)
    for slot in slots[:5]:
        queues.release(slot)
    assert queues.queues["a"].streams_limit == 7
    await take(queues, "a")
    await take(queues, "a")
    waiting = await enter_later(queues, "a")
    assert not waiting.done()
    await asyncio.sleep(1.1)

    assert waiting.done()


async def test_gates_dead_upstream_is_passed_over_where_there_is_another() -> None:
    """Its jobs do not try it one after the other."""
    observer = MemoryObserver()
    queues = two(observer)
    await kill(queues, "a")

    assert (await take(queues, "a", "b")).upstream == "b"
    assert observer.all("circuit_changed") == [("a", "open")]


async def test_gates_dead_upstream_is_probed_by_jobs_that_could_go_elsewhere_too() -> None:
    """One at a time, when the probe is due; or it would never come back. The others do not wait for the verdict."""
    queues = two()
    await kill(queues, "a")
    await asyncio.sleep(5.01)
    probe, other = await take(queues, "a", "b"), await take(queues, "a", "b")
    assert (probe.upstream, other.upstream) == ("a", "b")
    queues.succeeded(probe)
    queues.release(probe)

    assert (await take(queues, "a", "b")).upstream == "a"


async def test_gates_waiting_for_an_upstream_that_is_found_dead_goes_elsewhere() -> None:
    """Who has a choice does not wait for the probe."""
    queues = two()
    slots = [await take(queues, "a") for _ in range(2)]
    waiting, stays = await enter_later(queues, "a", "b"), await enter_later(queues, "a")
    for slot in slots:
        queues.failed(slot, DOWN)
    await quiet()

    assert (await waiting).upstream == "b"
    assert not stays.done()


async def test_gates_one_call_probes_and_the_others_follow_when_it_succeeds() -> None:
    """Not all at once into an upstream that may still be dead."""
    observer = MemoryObserver()
    queues = two(observer)
    await kill(queues, "a")
    waiting = [await enter_later(queues, "a") for _ in range(3)]
    await asyncio.sleep(5.01)
    assert [task.done() for task in waiting] == [True, False, False]
    probe = await waiting[0]
    queues.succeeded(probe)
    queues.release(probe)
    await quiet()

    assert [task.done() for task in waiting] == [True] * 3
    assert observer.all("circuit_changed") == [("a", "open"), ("a", "half_open"), ("a", "closed")]


async def test_gates_all_dead_are_probed_in_the_order_in_which_they_are_due() -> None:
    """The second choice may be back before the first."""
    queues = two()
    await kill(queues, "b")
    await asyncio.sleep(1)
    await kill(queues, "a")
    loop = asyncio.get_running_loop()
    began = loop.time()
    slot = await queues.enter(["a", "b"], JOB)

    assert slot.upstream == "b"
    assert loop.time() - began == pytest.approx(4, abs=0.01)


async def test_gates_job_does_not_wait_for_a_dead_upstream_for_ever() -> None:
    """It fails, and nothing of what other jobs were told is told to it."""
    queues = two(max_wait_s=30)
    await kill(queues, "a")
    slot = await queues.enter(["a"], JOB)  # the probe, which hangs
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(UpstreamError) as refusal:
        await queues.enter(["a"], JOB)

    assert loop.time() - began == pytest.approx(30, abs=1.1)
    error = refusal.value.error
    assert (error.code, error.retriable, error.http_status) == ("upstream_unavailable", True, 503)
    assert "secret" not in error.message
    assert "upstream a" in error.message
    queues.release(slot)


async def test_gates_who_is_not_patient_is_refused_at_once() -> None:
    """Before and while the circuit opens."""
    queues = two()
    slots = [await take(queues, "a") for _ in range(2)]
    waiting = await enter_later(queues, "a", is_patient=False)
    for slot in slots:
        queues.failed(slot, DOWN)
    await quiet()

    with pytest.raises(UpstreamError):
        await waiting
    with pytest.raises(UpstreamError):
        await take(queues, "a", is_patient=False)


async def test_gates_tell_when_there_is_room_again() -> None:
    """The poll loop waits for that."""
    queues = two()
    told: list[int] = []
    queues.on_room = lambda: told.append(queues.in_flight)
    slot = await take(queues, "a")
    queues.release(slot)

    assert told == [0]


async def test_queue_waiter_that_leaves_wakes_the_next_one() -> None:
    """A job that fits goes at once when the larger job before it is cancelled."""
    queues = one(tokens_per_minute=1000)
    queues.release(await queues.enter(["a"], sized(900)))
    large = asyncio.create_task(queues.enter(["a"], sized(500)))
    small = asyncio.create_task(queues.enter(["a"], sized(50)))
    await quiet()
    assert not small.done()
    began = asyncio.get_running_loop().time()
    large.cancel()
    slot = await small

    assert asyncio.get_running_loop().time() == pytest.approx(began, abs=0.01)
    queues.release(slot)
