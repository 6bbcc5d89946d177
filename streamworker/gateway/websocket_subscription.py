"""One job's events on a websocket that carries many."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from streamworker.gateway import websocket_frames as frames
from streamworker.gateway.feeds import Push
from streamworker.gateway.outbound import Starved

if TYPE_CHECKING:
    from streamworker.gateway.feeds import Feed, FeedEvent, Tally
    from streamworker.gateway.outbound import Outbound

__all__ = ["FACE", "Subscription"]

FACE = "websocket"
BATCH_BYTES = 65_536
"""Size of the events that are written at once."""

POSITION_S = 60.0
"""Time without an event after which a client gets a fresh cursor."""

LOOK_S = 15.0
"""How often it is looked whether there was an event: to note the time of each would cost more than to frame it."""


class Subscription:
    """Writes the events of a feed as frames. `delivered` counts them."""

    __slots__ = (
        "_cursor",
        "_delivered",
        "_event_at",
        "_feed",
        "_head",
        "_id",
        "_is_live",
        "_out",
    )

    def __init__(self, id_: str, feed: Feed, out: Outbound, delivered: Tally) -> None:
        self._id = id_
        self._head = frames.event_head(id_)
        self._feed = feed
        self._cursor = feed.cursor
        self._out = out
        self._delivered = delivered
        self._event_at = asyncio.get_running_loop().time()
        self._is_live = False

    async def run(self) -> str:
        """Write until the job's end. Return why it is over: `ended`, or `stalled` where other subscriptions leave no room.

        Raises FeedError, ConnectionResetError.
        """
        try:
            await self._deliver()
        except Starved:
            return "stalled"
        return "ended"

    async def _deliver(self) -> None:
        feed, out = self._feed, self._out
        push = Push(self, out.write, self._delivered)
        while not feed.is_over:
            if out.is_full:
                await out.turn()
            event = feed.take()
            if event is None:
                if not self._is_live and feed.is_live:
                    self._is_live = True
                    out.write(frames.text_frame({"type": "live", "id": self._id}))
                event = await feed.next(push if self._is_live and not out.is_full else None)
                if event is None:
                    return
            if self._write(event) >= BATCH_BYTES:
                await asyncio.sleep(0)  # a long replay must not block other streams

    def delta(self, cursor: bytes, value: bytes) -> bytes:
        """Return a delta as a frame."""
        return frames.event_frame(self._head, cursor, value)

    def _write(self, event: FeedEvent) -> int:
        """Write an event, and with it what is ready, unless the client takes nothing now; return the number of bytes."""
        feed, head = self._feed, self._head
        data = [frames.event_frame(head, event.cursor.encode(), event.value)]
        size = len(data[0])
        limit = 0 if self._out.is_full else BATCH_BYTES
        while size < limit and (following := feed.take()) is not None:
            data.append(frame := frames.event_frame(head, following.cursor.encode(), following.value))
            size += len(frame)
        self._out.write(data[0] if len(data) == 1 else b"".join(data))
        self._delivered.events += len(data)
        return size

    def look(self) -> None:
        """Send a fresh cursor to the client of a quiet job. To be called every `LOOK_S`, or more often."""
        now = asyncio.get_running_loop().time()
        if (cursor := self._feed.cursor) != self._cursor:
            self._event_at, self._cursor = now, cursor
        elif now - self._event_at >= POSITION_S and not self._out.is_full:
            self._event_at = now
            place = self._feed.place().encode()
            self._out.write(frames.event_frame(self._head, place, b'{"type":"position"}'))
