"""A thousand jobs may begin in one turn of the event loop; a thousand calls must not.

To build a request and open its connection takes a fraction of a millisecond of processor time. All at once that is a
stall in which open streams stand still and heartbeats are late.
"""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["CallPacer"]


class CallPacer:
    """Lets so many through in one turn of the loop, in the order in which they came."""

    def __init__(self, per_turn: int) -> None:
        self._per_turn = per_turn
        self._left = per_turn
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_turning = False

    async def __call__(self) -> None:
        """Go through, in this turn or a later one."""
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
            if not waiter.done():  # cancelled while it waited
                self._left -= 1
                waiter.set_result(None)
        if self._waiting:
            self._turn()
