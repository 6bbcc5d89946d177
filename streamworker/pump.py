"""Push what can only be pulled: a task reads an asynchronous iterator and calls a subscriber."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

__all__ = ["Pump"]


class Pump:
    """Calls a subscriber with the pieces of an iterator, as a body that is pushed does. `start` it once, and `stop` it."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces
        self._is_running = asyncio.Event()
        self._is_running.set()
        self._task: asyncio.Task[None] | None = None

    def start(self, on_data: Callable[[bytes], None], on_end: Callable[[Exception | None], None]) -> None:
        """Begin to read. `on_end` gets what the iterator raised, or None at its end. Neither callback may raise."""
        self._task = asyncio.create_task(self._run(on_data, on_end), name="pump")

    def pause(self) -> None:
        """Read no more, and call `on_data` no more, until `resume`."""
        self._is_running.clear()

    def resume(self) -> None:
        """Read on."""
        self._is_running.set()

    async def stop(self) -> None:
        """End the task, and wait for its end. No callback is called any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(
        self, on_data: Callable[[bytes], None], on_end: Callable[[Exception | None], None]
    ) -> None:
        try:
            while True:
                await self._is_running.wait()
                piece = await anext(self._pieces)
                await self._is_running.wait()
                on_data(piece)
        except StopAsyncIteration:
            on_end(None)
        except Exception as error:  # noqa: BLE001 - the subscriber raises it
            on_end(error)
