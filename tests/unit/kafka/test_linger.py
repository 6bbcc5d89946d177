"""When the sink's batches leave: at once after a quiet while, else all together, at most once per linger."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from streamworker.kafka.sender import LingerScheduler

LINGER_S = 0.005


class Pump:
    """Notes when it may leave, in milliseconds from the beginning."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun = self._loop.time()
        self.left: list[float] = []

    def leave(self) -> None:
        self.left.append(round((self._loop.time() - self._begun) * 1000, 3))


def senders(count: int) -> list[Any]:
    return [cast("Any", Pump()) for _ in range(count)]


async def test_departures_after_a_quiet_while_leave_at_once() -> None:
    """A slow stream's deltas never wait."""
    (sender,) = senders(1)
    linger = LingerScheduler(LINGER_S)
    for _ in range(3):
        linger.ask(sender, at_once=False)
        await asyncio.sleep(0.050)
    assert sender.left == [0, 50, 100]


async def test_departures_under_load_leave_together_once_per_linger() -> None:
    """Whoever asks a moment after a departure waits for the next; all that have asked leave with it."""
    first, second, third = senders(3)
    linger = LingerScheduler(LINGER_S)
    linger.ask(first, at_once=False)
    await asyncio.sleep(0.001)
    linger.ask(second, at_once=False)
    await asyncio.sleep(0.001)
    linger.ask(third, at_once=False)
    await asyncio.sleep(0.010)
    assert (first.left, second.left, third.left) == ([0], [5], [5])


async def test_departures_urgent_takes_the_others_along() -> None:
    """A job's first delta does not wait, and there is no second request for those that did."""
    first, second, third = senders(3)
    linger = LingerScheduler(LINGER_S)
    linger.ask(first, at_once=False)
    await asyncio.sleep(0.001)
    linger.ask(second, at_once=False)
    linger.ask(third, at_once=True)
    await asyncio.sleep(0.010)
    assert (first.left, second.left, third.left) == ([0], [1], [1])


async def test_departures_hurried_while_waiting_leave_at_once() -> None:
    """And the linger is counted from then on."""
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


async def test_departures_hurried_in_every_turn_are_not_put_off() -> None:
    """A thousand jobs that begin bring a first delta each turn; none keeps the others from leaving."""
    first, second = senders(2)
    linger = LingerScheduler(LINGER_S)
    linger.ask(first, at_once=True)
    for _ in range(20):
        linger.hurry()
        await asyncio.sleep(0)
    linger.ask(second, at_once=True)
    await asyncio.sleep(0.001)
    assert (first.left, second.left) == ([0], [0])


async def test_departures_late_hurry_does_not_put_off_what_is_due() -> None:
    """Whoever hurries before the departure's own callback in the same turn changes nothing."""
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
async def test_departures_without_linger_never_wait(count: int) -> None:
    """For commands: what is there is sent."""
    (sender,) = senders(1)
    linger = LingerScheduler(0.0)
    for _ in range(count):
        linger.ask(sender, at_once=False)
        await asyncio.sleep(0.001)
    assert sender.left == list(range(count))
