"""The turnstile before an upstream: so many calls per turn of the loop, in order, and none is forgotten."""

from __future__ import annotations

import asyncio

import pytest

from streamworker.upstream.pacer import CallPacer


class Crowd:
    """Many who come at once; `through` notes the loop's turn in which each went through."""

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
        """How many went through in each turn in which any did."""
        turns = [turn for turn, _ in self.through]
        return [turns.count(turn) for turn in sorted(set(turns))]


@pytest.mark.parametrize(("size", "sizes"), [(1, [1]), (4, [4]), (5, [4, 1]), (18, [4, 4, 4, 4, 2])])
async def test_turnstile_lets_so_many_through_per_turn_in_order(size: int, sizes: list[int]) -> None:
    """All of them in the end."""
    crowd = Crowd(size, 4)
    await crowd.watch()
    assert [number for _, number in crowd.through] == list(range(size))
    assert crowd.sizes() == sizes


async def test_turnstile_after_a_crowd_is_open_at_once() -> None:
    """Who comes alone does not wait."""
    crowd = Crowd(9, 4)
    await crowd.watch()
    late = crowd._pacer()
    with pytest.raises(StopIteration):
        late.send(None)


async def test_turnstile_cancelled_in_the_queue_takes_nobodys_turn() -> None:
    """Those behind come when they would have come without."""
    crowd = Crowd(12, 4)
    await asyncio.sleep(0)
    for task in crowd.tasks[4:8]:
        task.cancel()
    await crowd.watch()
    assert [number for _, number in crowd.through] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert crowd.sizes() == [4, 4]
