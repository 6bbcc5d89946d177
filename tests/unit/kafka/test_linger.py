"""When the sink's batches leave: at once after a pause, else all together, at most once per linger."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from streamworker.kafka.sender import LingerScheduler

LINGER_S = 0.005


class Sender:
    """Records when it leaves, in milliseconds since its creation."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._created = self._loop.time()
        self.left: list[float] = []

    def leave(self) -> None:
        self.left.append(round((self._loop.time() - self._created) * 1000, 3))


def senders(count: int) -> list[Any]:
    return [cast("Any", Sender()) for _ in range(count)]


async def test_linger_after_a_pause_lets_batches_leave_at_once() -> None:
    """The deltas of a slow stream never wait."""
    (sender,) = senders(1)
    linger = LingerScheduler(LINGER_S)
    for _ in range(3):
        linger.ask(sender, at_once=False)
        await asyncio.sleep(0.050)
    assert sender.left == [0, 50, 100]


async def test_linger_under_load_lets_batches_leave_together_once_per_interval() -> None:
    """A sender that asks shortly after others left waits for the next time; all waiting senders leave then."""
    first, second, third = senders(3)
    linger = LingerScheduler(LINGER_S)
    linger.ask(first, at_once=False)
    await asyncio.sleep(0.001)
    linger.ask(second, at_once=False)
    await asyncio.sleep(0.001)
    linger.ask(third, at_once=False)
    await asyncio.sleep(0.010)
    assert (first.left, second.left, third.left) == ([0], [5], [5])


async def test_linger_for_an_urgent_sender_takes_the_waiting_ones_along() -> None:
    """A job's first delta does not wait, and the senders that waited need no second request."""
    first, second, third = senders(3)
    linger = LingerScheduler(LINGER_S)
    linger.ask(first, at_once=False)
    await asyncio.sleep(0.001)
    linger.ask(second, at_once=False)
    linger.ask(third, at_once=True)
    await asyncio.sleep(0.010)
    assert (first.left, second.left, third.left) == ([0], [1], [1])


async def test_linger_that_is_hurried_lets_batches_leave_at_once() -> None:
    """The interval begins again at that moment."""
    (sender,) = senders(1)
    linger = LingerScheduler(LINGER_S)
    linger.ask(sender, at_once=False)
    await asyncio.sleep(0.001)
    linger.ask(sender, at_once=False)
    linger.hurry()
    await asyncio.sleep(0.001)
    linger.ask(sender, at_once=False)
    await asyncio.sleep(0.010)
    assert sender.left == [0, 1, 6]


async def test_linger_that_is_hurried_in_every_iteration_is_not_postponed() -> None:
    """A thousand jobs that begin publish a first delta in each iteration; none of them delays the others."""
    first, second = senders(2)
    linger = LingerScheduler(LINGER_S)
    linger.ask(first, at_once=True)
    for _ in range(20):
        linger.hurry()
        await asyncio.sleep(0)
    linger.ask(second, at_once=True)
    await asyncio.sleep(0.001)
    assert (first.left, second.left) == ([0], [0])


async def test_linger_that_is_hurried_again_in_the_same_iteration_is_not_postponed() -> None:
    """A second call before the callback of the first one changes nothing."""
    (sender,) = senders(1)
    loop = asyncio.get_running_loop()
    linger = LingerScheduler(LINGER_S)
    turns = 0

    def hurry() -> None:
        nonlocal turns
        turns += 1
        if turns < 20 and not sender.left:
            loop.call_soon(hurry)
        linger.hurry()

    loop.call_soon(hurry)
    linger.ask(sender, at_once=True)
    await asyncio.sleep(0.001)
    assert sender.left == [0]
    assert turns <= 3


@pytest.mark.parametrize("count", [1, 40])
async def test_linger_of_zero_never_waits(count: int) -> None:
    """Commands send each record at once."""
    (sender,) = senders(1)
    linger = LingerScheduler(0.0)
    for _ in range(count):
        linger.ask(sender, at_once=False)
        await asyncio.sleep(0.001)
    assert sender.left == list(range(count))
