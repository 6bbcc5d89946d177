"""One response that carries the events of a job as they come.

Events are written to the transport, in chunks that are framed here: aiohttp's writer takes twice the time per event.
"""

from __future__ import annotations

import asyncio
import random
from functools import partial
from math import inf
from typing import TYPE_CHECKING

from streamworker.gateway.feeds import FeedError, Push
from streamworker.gateway.frames import chunk
from streamworker.gateway.outbound import Outbound
from streamworker.telemetry import gateway_metrics as table

if TYPE_CHECKING:
    from streamworker.gateway.auth import Caller
    from streamworker.gateway.feeds import Feed
    from streamworker.gateway.frames import Framing
    from streamworker.gateway.gateway import Gateway
    from streamworker.gateway.stream_connection import StreamConnection

__all__ = ["ClientStream", "lifetime_s"]

BATCH_BYTES = 65_536
"""Size of the events that are written at once."""

POSITION_S = 60.0
"""Time without an event after which a client gets a fresh cursor."""

_LAST_WORD_S = 5.0
"""How long a client that has stalled may take the end of its stream before the connection is cut."""

_EARLY_S = 0.005
"""By how much a timer may be early."""


class ClientStream:
    """Writes the events of a feed behind the head of a response, until the job or something else ends it."""

    __slots__ = (
        "_caller",
        "_closes_at",
        "_closes_because",
        "_cursor",
        "_delivered",
        "_event_at",
        "_feed",
        "_framing",
        "_gateway",
        "_is_chunked",
        "_is_open",
        "_loop",
        "_out",
        "_task",
        "_timer",
        "reason",
    )

    def __init__(
        self,
        gateway: Gateway,
        connection: StreamConnection,
        feed: Feed,
        framing: Framing,
        caller: Caller,
        *,
        is_chunked: bool,
    ) -> None:
        """`run` closes the feed, and gives the stream of the caller back that `Limits.enter` has counted."""
        settings = gateway.settings.gateway
        self._gateway = gateway
        self._delivered = gateway.limits.delivered[framing.face]
        self._out = Outbound(
            connection, settings.stall_s, hold=feed.hold, stalled=partial(self.close, "stalled")
        )
        self._feed = feed
        self._cursor = feed.cursor
        self._framing = framing
        self._caller = caller
        self._is_chunked = is_chunked
        self._loop = asyncio.get_running_loop()
        self.reason: str | None = None
        """Why the stream is closed before the job's end."""
        self._is_open = True
        self._event_at = now = self._loop.time()
        self._closes_at, self._closes_because = now + lifetime_s(settings.max_stream_age_s), "age"
        if (expires_at := caller.expires_at) is not None:
            expires_in_s = max(0.0, expires_at - gateway.clock.now_ms() / 1000)
            if now + expires_in_s < self._closes_at:
                self._closes_at, self._closes_because = now + expires_in_s, "token_expired"
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def run(self) -> int:
        """Write until the end. Return the status for the access log: 499 if the client disconnected before."""
        reason = "disconnected"
        try:
            reason = await self._write_all()
        except ConnectionError:
            pass
        finally:
            self._feed.close()
            self._gateway.limits.leave(self._caller, self._framing.face)
            self._gateway.metrics.add(table.STREAMS_CLOSED, 1, self._framing.face, self.reason or reason)
        return 499 if reason == "disconnected" else 200

    async def _write_all(self) -> str:
        """Write until the end. Return the reason: `ended`, or that of the `closing` event."""
        self._task = task = asyncio.current_task()
        drain = self._gateway.drain
        registration = drain.register(partial(self.close, "shutdown"))
        try:
            self._write(self._framing.opening())
            self._arm()
            await self._deliver()
        except asyncio.CancelledError:
            if self.reason is None or (task is not None and task.uncancel() > 0):
                raise  # the client is gone
        except FeedError:
            self.reason = "shutdown" if drain.is_draining else "error"
        finally:
            self._is_open = False
            self._out.stop()
            drain.unregister(registration)
            if self._timer is not None:
                self._timer.cancel()
        if self.reason is None:
            self._end()
            return "ended"
        self._say_goodbye(self.reason)
        return self.reason

    def close(self, reason: str) -> None:
        """End the stream with a `closing` event."""
        if self._is_open and self.reason is None:
            self.reason = reason
            if self._task is not None:
                self._task.cancel()

    async def _deliver(self) -> None:
        feed, out, frame = self._feed, self._out, self._framing.event
        push = Push(self._framing, out.transport.write, self._delivered) if self._is_chunked else None
        while not feed.is_over:
            if out.is_full:
                await out.drained()
            event = feed.take() or await feed.next(push)
            if event is None:
                break
            frames = [frame(event)]
            size = len(frames[0])
            while size < BATCH_BYTES and (event := feed.take()) is not None:
                frames.append(data := frame(event))
                size += len(data)
            self._write(frames[0] if len(frames) == 1 else b"".join(frames))
            self._delivered.events += len(frames)
            if size >= BATCH_BYTES:
                await asyncio.sleep(0)  # a long replay must not block other streams
        # The connection may serve further requests, and does not watch whether the client takes this.
        if out.is_full:
            await out.drained()

    def _write(self, data: bytes) -> None:
        if data:
            self._out.write(chunk(data) if self._is_chunked else data)

    def _end(self) -> None:
        """Write the end of the body. The connection is closed behind it."""
        if self._is_chunked:
            self._out.write(b"0\r\n\r\n")

    def _say_goodbye(self, reason: str) -> None:
        value = {"type": "closing", "reason": reason, "retriable": reason != "token_expired"}
        data = self._framing.own(
            "closing", value, self._feed.cursor if self._framing.face == "ndjson" else None
        )
        self._write(data)
        self._end()
        if reason == "stalled":
            # The end waits behind what the client does not take: do not wait for it, and cut the connection soon.
            self._loop.call_later(_LAST_WORD_S, self._out.abort)
            raise ConnectionResetError("the client has stalled")

    # Quiet streams, and the end of their time

    def _arm(self) -> None:
        keep_alive_at = self._loop.time() + self._gateway.settings.gateway.keep_alive_s
        self._timer = self._loop.call_at(min(keep_alive_at, self._closes_at), self._tick)

    def _tick(self) -> None:
        now = self._loop.time()
        if now >= self._closes_at - _EARLY_S:
            self._closes_at = inf
            self.close(self._closes_because)
            return
        if not self._gateway.authenticator.is_valid(self._caller):
            self.close("token_expired")
            return
        if (cursor := self._feed.cursor) != self._cursor:
            self._event_at, self._cursor = now, cursor
        elif self._out.is_full:
            pass
        elif now - self._event_at >= POSITION_S:
            self._event_at = now
            self._write(self._framing.own("position", {"type": "position"}, self._feed.place()))
        else:
            self._write(self._framing.keep_alive)
        self._arm()


def lifetime_s(max_age_s: float) -> float:
    """Return the age at which a stream is closed for renewal: `max_age_s`, give or take 10 %."""
    return max_age_s * random.uniform(0.9, 1.1)  # noqa: S311 - not a secret
