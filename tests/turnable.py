"""An event loop whose time is turned, not waited for: it jumps to the next timer whenever nobody has anything to do.

Timeouts of minutes pass in no time and to the millisecond, and a test that would wait for ever fails at once.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["TurnableLoop", "quiet", "run", "until"]

_A_MOMENT_S = 1e-6


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that moves the loop's clock instead of waiting."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if events := super().select(0):
            return events
        if timeout is None:
            raise AssertionError("nothing will ever happen: everyone waits, and no timer is set")
        self.now += timeout
        return []


class TurnableLoop(asyncio.SelectorEventLoop):
    """A loop for tests without sockets and threads."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def run(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine in a loop of its own, for tests that are not coroutines themselves."""
    with asyncio.Runner(loop_factory=TurnableLoop) as runner:
        runner.run(work)


async def quiet() -> None:
    """Wait until everyone waits for something: a timer, a gate, us."""
    await asyncio.sleep(_A_MOMENT_S)


async def until(condition: Callable[[], object], *, within_s: float = 100, every_s: float = 0.01) -> None:
    """Wait for a condition, looking again and again."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - any condition, of anything
            await asyncio.sleep(every_s)
