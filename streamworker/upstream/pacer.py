"""Spreads the start of many calls over several turns of the event loop.

Building a request and opening its connection takes a fraction of a millisecond of CPU time. A thousand of them in one
turn would stall open streams and delay the group's heartbeats.
"""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["CallPacer"]


class CallPacer:
    """Lets `per_turn` callers through in each turn of the loop, in the order of their arrival."""

    def __init__(self, per_turn: int) -> None:
        self._per_turn = per_turn
        self._left = per_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._resuming = 0  # waiters that were released and have not run yet
        self._is_scheduled = False

    async def __call__(self) -> None:
        """Go through, in this turn or in a later one."""
        self._schedule()
        if self._left and not self._waiting and not self._resuming:
            self._left -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        finally:
            if not turn.cancelled():
                self._resuming -= 1

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._begin_turn)

    def _begin_turn(self) -> None:
        self._is_scheduled = False
        self._left = self._per_turn
        while self._left and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():  # a cancelled waiter takes no turn
                self._left -= 1
                self._resuming += 1
                waiter.set_result(None)
        if self._waiting:
            self._schedule()
