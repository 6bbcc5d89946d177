"""Call pacing: a bounded number of calls per turn of the loop, in their order."""

from __future__ import annotations

import asyncio

import pytest

from streamworker.upstream.pacer import CallPacer


class Crowd:
    """Callers that arrive at once; `through` has the turn of the loop in which each went through, and its number."""

    def __init__(self, size: int, per_turn: int) -> None:
        self._pacer = CallPacer(per_turn)
        self._turn = 0
        self.through: list[tuple[int, int]] = []
        self.tasks = [asyncio.create_task(self._go(number)) for number in range(size)]

    async def _go(self, number: int) -> None:
        await self._pacer()
        self.through.append((self._turn, number))

    async def watch(self) -> None:
        for turn in range(4 * len(self.tasks)):
            self._turn = turn
            await asyncio.sleep(0)

    def sizes(self) -> list[int]:
        """Return the number of callers that went through in each turn in which any did."""
        turns = [turn for turn, _ in self.through]
        return [turns.count(turn) for turn in sorted(set(turns))]


@pytest.mark.parametrize(("size", "sizes"), [(1, [1]), (4, [4]), (5, [4, 1]), (18, [4, 4, 4, 4, 2])])
async def test_pacer_lets_per_turn_callers_through_in_order(size: int, sizes: list[int]) -> None:
    """Every caller goes through in the end."""
    crowd = Crowd(size, 4)
    await crowd.watch()
    assert [number for _, number in crowd.through] == list(range(size))
    assert crowd.sizes() == sizes


async def test_pacer_without_waiters_is_open_at_once() -> None:
    """A single caller does not wait."""
    crowd = Crowd(9, 4)
    await crowd.watch()
    late = crowd._pacer()
    with pytest.raises(StopIteration):
        late.send(None)


async def test_pacer_waiter_that_is_cancelled_takes_no_turn() -> None:
    """The callers behind it go through as if it had not been there."""
    crowd = Crowd(12, 4)
    await asyncio.sleep(0)
    for task in crowd.tasks[4:8]:
        task.cancel()
    await crowd.watch()
    assert [number for _, number in crowd.through] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert crowd.sizes() == [4, 4]


async def test_pacer_caller_that_arrives_later_does_not_overtake_a_waiter() -> None:
    """A waiter that was just released resumes before a caller that arrives in the same turn."""
    pacer = CallPacer(4)
    through: list[str] = []

    async def go(name: str) -> None:
        await pacer()
        through.append(name)

    tasks = [asyncio.create_task(go(f"early {number}")) for number in range(6)]
    while len(through) < 4:  # noqa: ASYNC110 - a turn of the loop at a time
        await asyncio.sleep(0)
    tasks.append(asyncio.create_task(go("late")))
    await asyncio.gather(*tasks)

    assert through == [*(f"early {number}" for number in range(6)), "late"]
