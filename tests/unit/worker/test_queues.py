"""The queues of jobs that wait for a slot at an upstream."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from streamworker.errors import UpstreamError
from streamworker.model import Coordinates, ErrorCode, JobError
from streamworker.testing import MemoryObserver
from tests.streams import make_job
from tests.turnable import quiet
from tests.unit.worker.bench import make_policies, make_queues

if TYPE_CHECKING:
    from streamworker.limits.limiter import Slot, Verdict
    from streamworker.model import Job
    from streamworker.worker.queues import UpstreamQueues

DOWN = JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "the prompt was: secret", 503, retriable=True)
BUSY = JobError(ErrorCode.RATE_LIMITED, "slow down", 429, retriable=True)
JOB = make_job()


def two(observer: MemoryObserver | None = None, *, max_wait_s: float = 60, **options: Any) -> UpstreamQueues:
    """Two upstreams with two streams each, whose circuits open after two failures."""
    policies = make_policies("a", "b", max_streams=2, circuit_failure_threshold=2, max_wait_s=max_wait_s)
    return make_queues(observer or MemoryObserver(), policies, **options)


def one(**members: Any) -> UpstreamQueues:
    """One upstream with these settings."""
    return make_queues(MemoryObserver(), make_policies("a", **members))


def sized(tokens: int) -> Job:
    """A job whose completion may have this number of tokens."""
    return msgspec.structs.replace(JOB, request={"max_tokens": msgspec.Raw(str(tokens).encode())})


async def take(queues: UpstreamQueues, *upstreams: str, **options: Any) -> Slot:
    """Take a slot that is free now."""
    async with asyncio.timeout(0.0005):
        return await queues.enter(upstreams, JOB, **options)


async def kill(queues: UpstreamQueues, upstream: str) -> None:
    """Let calls fail until the circuit opens."""
    while not queues.queues[upstream].limiter.is_open:
        slot = await take(queues, upstream)
        queues.failed(slot, DOWN, "job")
        queues.release(slot)


async def enter_later(queues: UpstreamQueues, *upstreams: str, **options: Any) -> asyncio.Task[Slot]:
    task = asyncio.create_task(queues.enter(upstreams, JOB, **options))
    await quiet()
    return task


async def test_queue_grants_as_many_slots_as_fit_and_one_for_each_released() -> None:
    """Waiting jobs get slots in their order."""
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


async def test_queue_of_a_full_upstream_delays_no_other_upstream() -> None:
    """Each upstream has its own queue."""
    queues = two()
    for _ in range(2):
        await take(queues, "a")
    waiting = await enter_later(queues, "a")
    slot = await take(queues, "b")

    assert slot.upstream == "b"
    assert not waiting.done()
    assert queues.states()["a"] == {
        "circuit": "closed",
        "held": None,
        "held_s": 0.0,
        "streams_open": 2,
        "streams_limit": 2,
        "jobs_waiting": 1,
    }


async def test_queues_bound_the_jobs_in_flight_of_the_process() -> None:
    """When a slot is released, the queues take turns."""
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


async def test_queue_retry_goes_before_first_calls() -> None:
    """A retry has waited for longer."""
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


async def test_queue_waiter_that_is_cancelled_leaves() -> None:
    """The next waiter gets the slot."""
    queues = one(max_streams=1)
    slot = await take(queues, "a")
    gone, stays = await enter_later(queues, "a"), await enter_later(queues, "a")
    gone.cancel()
    queues.release(slot)
    await quiet()

    assert gone.cancelled()
    assert stays.done()
    assert queues.in_flight == 1


async def test_queue_slot_granted_at_the_moment_of_a_cancellation_is_released() -> None:
    """Otherwise the slot would be lost forever."""
    queues = one(max_streams=1)
    slot = await take(queues, "a")
    waiting = await enter_later(queues, "a")
    queues.release(slot)
    waiting.cancel()
    await quiet()

    assert waiting.cancelled()
    assert queues.in_flight == 0
    await take(queues, "a")


async def test_slot_released_twice_is_released_once() -> None:
    """The second release, and results after it, change nothing."""
    queues = two()
    slot = await take(queues, "a")
    queues.release(slot)
    queues.release(slot)
    queues.failed(slot, DOWN, "job")
    queues.succeeded(slot)

    assert queues.in_flight == 0
    assert queues.queues["a"].streams_open == 0


async def test_queue_with_a_limit_per_minute_goes_on_when_the_minute_is_over() -> None:
    """A timer grants the next slot; no slot has to be released."""
    queues = one(requests_per_minute=2)
    loop = asyncio.get_running_loop()
    began = loop.time()
    for _ in range(5):
        queues.release(await queues.enter(["a"], JOB))

    assert loop.time() - began == pytest.approx(122, abs=0.1)


async def test_queue_after_a_429_grants_fewer_slots_and_recovers() -> None:
    """A waiter gets its slot when one more stream is tried."""
    queues = one(max_streams=10)
    slots = [await take(queues, "a") for _ in range(10)]
    for slot in slots[:7]:
        queues.answered(slot)
    await asyncio.sleep(0.1)
    for slot in slots[7:]:
        queues.failed(slot, BUSY, "job")
        queues.release(slot)
    assert queues.queues["a"].streams_limit == 7
    queues.release(slots[0])
    await asyncio.sleep(1)
    queues.answered(await take(queues, "a"))
    waiting = await enter_later(queues, "a")
    await asyncio.sleep(8)
    assert not waiting.done()
    await asyncio.sleep(1.1)

    assert waiting.done()


async def test_queue_of_an_open_circuit_is_skipped_for_a_fallback() -> None:
    """Its jobs do not try it one after another."""
    observer = MemoryObserver()
    queues = two(observer)
    await kill(queues, "a")

    assert (await take(queues, "a", "b")).upstream == "b"
    assert observer.all("circuit_changed") == [("a", "open", "unavailable")]
    assert observer.all("upstream_held") == [("a", "unavailable")]


async def test_queue_of_an_open_circuit_is_probed_by_jobs_with_a_fallback() -> None:
    """One job probes when a probe is due; the others go to the fallback meanwhile."""
    queues = two()
    await kill(queues, "a")
    await asyncio.sleep(5.01)
    probe, other = await take(queues, "a", "b"), await take(queues, "a", "b")
    assert (probe.upstream, other.upstream) == ("a", "b")
    queues.succeeded(probe)
    queues.release(probe)

    assert (await take(queues, "a", "b")).upstream == "a"


async def test_queue_whose_circuit_opens_moves_jobs_with_a_fallback() -> None:
    """A job without a fallback stays."""
    queues = two()
    slots = [await take(queues, "a") for _ in range(2)]
    waiting, stays = await enter_later(queues, "a", "b"), await enter_later(queues, "a")
    for slot in slots:
        queues.failed(slot, DOWN, "job")
    await quiet()

    assert (await waiting).upstream == "b"
    assert not stays.done()


async def test_queue_of_an_open_circuit_goes_on_after_a_probe_that_succeeds() -> None:
    """Until then one job at a time calls the upstream."""
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
    assert [state for _, state, _ in observer.all("circuit_changed")] == ["open", "half_open", "closed"]
    assert [name for name, _ in observer.calls if name.startswith("upstream")] == [
        "upstream_held",
        "upstream_released",
    ]


async def test_queues_that_are_all_shut_are_probed_when_they_are_due() -> None:
    """The fallback may be probed before the first choice."""
    queues = two()
    await kill(queues, "b")
    await asyncio.sleep(1)
    await kill(queues, "a")
    loop = asyncio.get_running_loop()
    began = loop.time()
    slot = await queues.enter(["a", "b"], JOB)

    assert slot.upstream == "b"
    assert loop.time() - began == pytest.approx(4, abs=0.01)


async def test_queue_job_waits_for_max_wait_s_at_most() -> None:
    """Its error names what it waited for, and has no text of another job's call."""
    queues = two(max_wait_s=30)
    await kill(queues, "a")
    slot = await queues.enter(["a"], JOB)  # the probe, which hangs
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(UpstreamError) as refusal:
        await queues.enter(["a"], JOB)

    assert loop.time() - began == pytest.approx(30, abs=1.1)
    error = refusal.value.error
    assert (error.code, error.retriable) == ("upstream_unavailable", True)
    assert error.message == (
        "the job waited 30 s for the upstream a, which is unavailable; its last call failed with upstream_unavailable"
    )
    queues.release(slot)


async def test_queue_job_that_must_not_wait_is_refused_at_once() -> None:
    """When it arrives, and when the circuit opens."""
    queues = two()
    slots = [await take(queues, "a") for _ in range(2)]
    waiting = await enter_later(queues, "a", is_patient=False)
    for slot in slots:
        queues.failed(slot, DOWN, "job")
    await quiet()

    with pytest.raises(UpstreamError):
        await waiting
    with pytest.raises(UpstreamError):
        await take(queues, "a", is_patient=False)


async def test_queues_report_when_there_is_room() -> None:
    """The poll loop waits for `on_room`."""
    queues = two()
    told: list[int] = []
    queues.on_room = lambda: told.append(queues.in_flight)
    slot = await take(queues, "a")
    queues.release(slot)

    assert told == [0]


REFUSED = JobError(ErrorCode.AUTH, "the key is: secret", 401)
EMPTY = JobError(ErrorCode.QUOTA, "no credit", 402)


async def fail(queues: UpstreamQueues, error: JobError, job_id: str = "job") -> Verdict:
    """Make a call that fails."""
    slot = await queues.enter(["a"], JOB)
    verdict = queues.failed(slot, error, job_id)
    queues.release(slot)
    return verdict


@pytest.mark.parametrize(
    ("error", "jobs", "code", "what"),
    [
        (
            DOWN,
            "aa",
            ErrorCode.UPSTREAM_UNAVAILABLE,
            "is unavailable; its last call failed with upstream_unavailable",
        ),
        (REFUSED, "a", ErrorCode.AUTH, "refuses the API key"),
        (EMPTY, "abc", ErrorCode.QUOTA, "reports an empty account"),
        (BUSY, "a", ErrorCode.RATE_LIMITED, "refuses further calls with 429"),
    ],
)
async def test_queue_job_that_waited_too_long_names_what_it_waited_for(
    error: JobError, jobs: str, code: ErrorCode, what: str
) -> None:
    """Code and message; the same reason is in `/readyz`, in the log and in the metric."""
    observer = MemoryObserver()
    queues = make_queues(
        observer,
        make_policies("a", max_wait_s=3, max_streams=4, circuit_failure_threshold=2, circuit_open_s=30),
    )
    for job_id in jobs:
        await fail(queues, error, job_id)
    queue, loop = queues.queues["a"], asyncio.get_running_loop()
    if error is BUSY:  # the pause alone is shorter
        queue.limiter._pause.until = loop.time() + 30
    probe, waiting = await enter_later(queues, "a"), await enter_later(queues, "a")  # the probe hangs
    assert (queue.held, queue.jobs_held) == (queue.state()["held"], 2)
    began = loop.time()
    with pytest.raises(UpstreamError) as refusal:
        await waiting

    assert 3 <= loop.time() - began <= 8
    await asyncio.gather(probe, return_exceptions=True)
    assert refusal.value.error.code is code
    assert refusal.value.error.message.endswith(f"s for the upstream a, which {what}")
    assert observer.all("upstream_held") == [("a", queue.held)]


async def test_queue_job_with_its_own_max_wait_s_waits_no_longer() -> None:
    """The upstream's `max_wait_s` is the upper bound."""
    queues = one(max_wait_s=10, circuit_open_s=100)
    await fail(queues, REFUSED)
    queues.queues["a"].limiter.circuit.probe_soon(0)
    await asyncio.sleep(1)
    await take(queues, "a")  # a probe that hangs
    loop = asyncio.get_running_loop()
    began = loop.time()

    async def waited_s(max_wait_s: float) -> int:
        with pytest.raises(UpstreamError):
            await queues.enter(["a"], msgspec.structs.replace(JOB, max_wait_s=max_wait_s))
        return round(loop.time() - began)

    assert await asyncio.gather(*map(waited_s, (0.0, 7.0, 99.0))) == [5, 7, 10]


async def test_queue_is_probed_before_a_wait_ends() -> None:
    """A job is not failed just before the upstream is back, however far away the next regular probe is."""
    queues = one(max_wait_s=20, circuit_open_s=100)
    await fail(queues, REFUSED)
    loop = asyncio.get_running_loop()
    began = loop.time()
    slot = await queues.enter(["a"], JOB)

    assert slot.is_probe
    assert 17 <= loop.time() - began <= 20
    queues.release(slot)


async def test_queue_is_probed_at_once_when_the_key_is_replaced() -> None:
    """The next regular probe may be far away."""
    keys = ["old"]
    queues = one(max_wait_s=1000, circuit_open_s=100, key_version=lambda: keys[0])
    await fail(queues, REFUSED)
    waiting = await enter_later(queues, "a")
    await asyncio.sleep(20)
    assert not waiting.done()
    keys[0] = "new"
    await asyncio.sleep(1.1)

    assert waiting.done()
    assert (await waiting).is_probe


async def test_queue_probes_use_different_jobs() -> None:
    """A job whose own prompt is refused does not keep the upstream held."""
    queues = one(circuit_open_s=5)
    await fail(queues, REFUSED)
    first, second = await enter_later(queues, "a"), await enter_later(queues, "a")
    await asyncio.sleep(5.01)
    queues.failed(slot := await first, REFUSED, "first")
    queues.release(slot)
    again = await enter_later(queues, "a", is_retry=True)
    await asyncio.sleep(10.01)

    assert second.done()
    assert not again.done()


async def test_queue_of_a_paused_upstream_is_skipped_for_a_fallback() -> None:
    """A job that can be called elsewhere does not wait for a rate limit."""
    queues = two()
    waiting = [await enter_later(queues, "a", "b") for _ in range(3)]
    slots = [await task for task in waiting[:2]]
    queues.failed(slots[0], BUSY, "job")

    assert (await waiting[2]).upstream == "b"
    assert (await take(queues, "a", "b")).upstream == "b"


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


def of(topic: str) -> Job:
    return msgspec.structs.replace(JOB, source=Coordinates(topic, 0, 0))


async def in_turn(queues: UpstreamQueues, held: Slot, waiting: dict[str, asyncio.Task[Slot]]) -> list[str]:
    """Release one slot after another; return the order in which the waiting jobs get it."""
    order: list[str] = []
    for _ in waiting:
        queues.release(held)
        await quiet()
        [name] = [name for name, task in waiting.items() if task.done() and name not in order]
        order.append(name)
        held = await waiting[name]
    return order


async def test_queue_lets_the_values_of_waiting_jobs_take_turns() -> None:
    """The jobs of one tenant do not delay the job of another for longer than one of them."""
    queues = one(max_streams=1)
    held = await take(queues, "a")
    waiting = {name: await enter_later(queues, "a", value=name[0]) for name in ("x1", "x2", "x3", "y1", "x4")}

    assert await in_turn(queues, held, waiting) == ["x1", "y1", "x2", "x3", "x4"]


async def test_queue_shares_slots_among_topics_by_weight() -> None:
    """The topic with fewest slots for its weight is next."""
    queues = make_queues(MemoryObserver(), make_policies("a", max_streams=4), weights={"chat": 3})
    held = [await queues.enter(["a"], of("bulk")) for _ in range(4)]
    waiting = {}
    for name in ("bulk", "chat1", "chat2", "chat3", "chat4"):
        waiting[name] = asyncio.create_task(queues.enter(["a"], of(name.rstrip("1234"))))
        await quiet()
    for slot in held:
        queues.release(slot)
        await quiet()

    assert {name for name, task in waiting.items() if task.done()} == {"chat1", "chat2", "chat3", "bulk"}
    assert (queues.in_flight_of("chat"), queues.in_flight_of("bulk")) == (3, 1)
    waiting["chat4"].cancel()


async def test_queue_limits_the_slots_of_one_value_over_all_upstreams() -> None:
    """A call that ends at one upstream lets a job of the same value begin at another."""
    queues = two(max_in_flight_per=1)
    held = await take(queues, "a", value="x")
    waiting = await enter_later(queues, "b", value="x")
    other = await take(queues, "b", value="y")
    assert not waiting.done()
    queues.end_call(held)
    await quiet()

    assert waiting.done()
    queues.release(other)


async def test_queue_forgets_a_cancelled_job_of_a_value() -> None:
    """Its turn is not taken, and nothing of it remains."""
    queues = one(max_streams=1)
    held = await take(queues, "a")
    gone, stays = await enter_later(queues, "a", value="x"), await enter_later(queues, "a", value="y")
    gone.cancel()
    await quiet()
    queues.release(held)
    await quiet()

    assert stays.done()
    assert queues.waiting == 0


async def test_queues_grant_a_free_slot_of_the_process_to_the_topic_with_fewest() -> None:
    """With one slot in the whole process, two upstreams do not alternate blindly."""
    queues = make_queues(
        MemoryObserver(), make_policies("a", "b", max_streams=9), max_in_flight=4, weights={"chat": 3}
    )
    held = [await queues.enter(["a"], of("bulk")) for _ in range(4)]
    waiting = [asyncio.create_task(queues.enter(["a"], of("bulk"))) for _ in range(3)]
    waiting += [asyncio.create_task(queues.enter(["b"], of("chat"))) for _ in range(3)]
    await quiet()
    for slot in held[:3]:
        queues.release(slot)
        await quiet()

    assert [task.done() for task in waiting] == [False] * 3 + [True] * 3
    for task in waiting:
        task.cancel()
