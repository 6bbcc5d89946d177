"""An event loop with a virtual clock: when no callback is ready, the clock jumps to the next timer.

Timeouts of minutes elapse at once and exactly, and a test that would wait for ever fails at once.
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
"""How long a local socket may take to become readable after its peer has written, in seconds."""


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that advances the loop's clock instead of waiting."""

    def __init__(self, poll_s: float = 0.0) -> None:
        super().__init__()
        self.now = 1000.0
        self._poll_s = poll_s

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if events := super().select(0 if timeout is not None and timeout <= 0 else self._poll_s):
            return events
        if timeout is None:
            raise AssertionError("deadlock: every task waits, and no timer is set")
        self.now += timeout
        return []


class TurnableLoop(asyncio.SelectorEventLoop):
    """A loop with a virtual clock, for tests without sockets and threads."""

    def __init__(self, poll_s: float = 0.0) -> None:
        self._jumping = _JumpingSelector(poll_s)
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


class SocketLoop(TurnableLoop):
    """A loop for tests whose sockets have both ends in it: the clock jumps when no socket is ready."""

    def __init__(self) -> None:
        super().__init__(_KERNEL_S)


def run(work: Coroutine[Any, Any, T], loop_factory: Callable[[], TurnableLoop] = TurnableLoop) -> T:
    """Run a coroutine in a new loop, for tests that are not coroutines."""
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        return runner.run(work)


async def quiet() -> None:
    """Wait until every other task is blocked."""
    await asyncio.sleep(_A_MOMENT_S)


async def until(condition: Callable[[], object], *, within_s: float = 100, every_s: float = 0.01) -> None:
    """Wait for a condition, which is tested every `every_s`. Raises TimeoutError after `within_s`."""
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(every_s)
