"""An event loop whose time is turned, not waited for: it jumps to the next timer whenever nobody has anything to do.

Timeouts of minutes pass in no time and to the millisecond, and a test that would wait for ever fails at once.
"""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["SocketLoop", "TurnableLoop", "quiet", "run", "until"]

T = TypeVar("T")
_A_MOMENT_S = 1e-6
_KERNEL_S = 0.002
"""How long a socket of this machine may take to be ready once its peer has written: it has no network to cross."""


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that moves the loop's clock instead of waiting."""

    def __init__(self, patience_s: float = 0.0) -> None:
        super().__init__()
        self.now = 1000.0
        self._patience_s = patience_s

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if events := super().select(0 if timeout is not None and timeout <= 0 else self._patience_s):
            return events
        if timeout is None:
            raise AssertionError("nothing will ever happen: everyone waits, and no timer is set")
        self.now += timeout
        return []


class TurnableLoop(asyncio.SelectorEventLoop):
    """A loop for tests without sockets and threads."""

    def __init__(self, patience_s: float = 0.0) -> None:
        self._jumping = _JumpingSelector(patience_s)
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


class SocketLoop(TurnableLoop):
    """One for tests whose sockets have both ends in this loop: time jumps once the kernel has nothing for either."""

    def __init__(self) -> None:
        super().__init__(_KERNEL_S)


def run(work: Coroutine[Any, Any, T], loop_factory: Callable[[], TurnableLoop] = TurnableLoop) -> T:
    """Run a coroutine in a loop of its own, for tests that are not coroutines themselves."""
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(work)


async def quiet() -> None:
    """Wait until everyone waits for something: a timer, a gate, us."""
    await asyncio.sleep(_A_MOMENT_S)


async def until(condition: Callable[[], object], *, within_s: float = 100, every_s: float = 0.01) -> None:
    """Wait for a condition, looking again and again."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - any condition, of anything
            await asyncio.sleep(every_s)
