"""A pump calls a subscriber with what an iterator yields."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from streamworker.pump import Pump

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


class Subscriber:
    """What a subscriber was called with; it pauses after each piece if `pauses`."""

    def __init__(self, pump: Pump, *, pauses: bool = False) -> None:
        self.pieces: list[bytes] = []
        self.ends: list[Exception | None] = []
        self._pump = pump
        self._pauses = pauses

    def on_data(self, piece: bytes) -> None:
        self.pieces.append(piece)
        if self._pauses:
            self._pump.pause()


async def letters(error: Exception | None = None) -> AsyncIterator[bytes]:
    for letter in (b"a", b"b", b"c"):
        await asyncio.sleep(0)
        yield letter
    if error is not None:
        raise error


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_pump_gives_every_piece_and_the_end() -> None:
    """In order; the end has no error."""
    pump = Pump(letters())
    seen = Subscriber(pump)
    pump.start(seen.on_data, seen.ends.append)
    await turns()

    assert (seen.pieces, seen.ends) == ([b"a", b"b", b"c"], [None])


async def test_pump_gives_what_the_iterator_raises() -> None:
    """After the pieces before it."""
    pump = Pump(letters(fault := ValueError("broken")))
    seen = Subscriber(pump)
    pump.start(seen.on_data, seen.ends.append)
    await turns()

    assert (seen.pieces, seen.ends) == ([b"a", b"b", b"c"], [fault])


async def test_pump_that_is_paused_gives_nothing() -> None:
    """Each resume gives one more piece here, because the subscriber pauses again."""
    pump = Pump(letters())
    seen = Subscriber(pump, pauses=True)
    pump.start(seen.on_data, seen.ends.append)
    await turns()
    assert seen.pieces == [b"a"]
    pump.resume()
    await turns()

    assert seen.pieces == [b"a", b"b"]
    await pump.stop()


async def test_pump_that_is_stopped_calls_no_handler() -> None:
    """Neither with a piece nor with an end."""
    pump = Pump(letters())
    seen = Subscriber(pump)
    pump.start(seen.on_data, seen.ends.append)
    await pump.stop()
    await turns()

    assert (seen.pieces, seen.ends) == ([], [])
