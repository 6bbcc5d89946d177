"""Submit many jobs, a window of them at a time."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping

    from streamworker.client.client import Client
    from streamworker.client.result import Result

__all__ = ["arguments_of", "results_of"]


def arguments_of(item: Mapping[str, Any], common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of `submit` for one item of `map`."""
    return {**common, **(item if "request" in item else {"request": item})}


async def results_of(
    client: Client,
    requests: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
    window: int,
    common: Mapping[str, Any],
) -> AsyncIterator[Result]:
    """Yield results as jobs end. See `Client.map`."""
    if window < 1:
        raise ValueError("window must be at least 1")
    ended: asyncio.Queue[asyncio.Task[Result]] = asyncio.Queue()
    running: set[asyncio.Task[Result]] = set()

    def start(item: Mapping[str, Any]) -> None:
        task = asyncio.create_task(client.complete(**arguments_of(item, common)))
        running.add(task)
        task.add_done_callback(ended.put_nowait)

    async def next_result() -> Result:
        task = await ended.get()
        running.discard(task)
        return task.result()

    try:
        async for item in _each(requests):
            while len(running) >= window:
                yield await next_result()
            start(item)
            await asyncio.sleep(0)  # an iterable that never waits must not delay what is running
            while not ended.empty():
                yield await next_result()
        while running:
            yield await next_result()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _each(
    requests: Iterable[Mapping[str, Any]] | AsyncIterable[Mapping[str, Any]],
) -> AsyncIterator[Mapping[str, Any]]:
    if hasattr(requests, "__aiter__"):
        async for item in requests:
            yield item
    else:
        for item in requests:
            yield item
