"""Spreads the start of calls over turns of the event loop.

Building a request and opening its connection takes a fraction of a millisecond of CPU. A thousand calls at
once would stall open streams and delay heartbeats.
"""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["CallPacer"]


class CallPacer:
    """Admits a limited number of callers per turn of the event loop, in the order in which they called."""

    def __init__(self, per_turn: int) -> None:
        self._per_turn = per_turn
        self._left = per_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_turning = False

    async def __call__(self) -> None:
        """Return in this turn or a later one."""
        self._turn()
        if self._left and not self._waiting:
            self._left -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def _turn(self) -> None:
        if not self._is_turning:
            self._is_turning = True
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self._is_turning = False
        self._left = self._per_turn
        while self._left and self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():  # a cancelled waiter does not use up the turn
                self._left -= 1
                waiter.set_result(None)
        if self._waiting:
            self._turn()
