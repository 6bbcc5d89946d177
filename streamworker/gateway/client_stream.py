"""One response that carries the events of a job as they come.

Events are written to the transport, in chunks that are framed here: aiohttp's writer takes twice the time per event.
"""

from __future__ import annotations

import asyncio
import random
from contextlib import ExitStack
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11

from streamworker.gateway.feeds import FeedError
from streamworker.gateway.frames import chunk
from streamworker.gateway.outbound import Outbound

if TYPE_CHECKING:
    from aiohttp import web

    from streamworker.gateway.auth import Caller
    from streamworker.gateway.feeds import Feed, FeedEvent
    from streamworker.gateway.frames import Framing
    from streamworker.gateway.gateway import Gateway

__all__ = ["ClientStream", "lifetime_s"]

BATCH_BYTES = 65_536
"""Size of the events that are written at once."""

POSITION_S = 60.0
"""Time without an event after which a client gets a fresh cursor."""

_LAST_WORD_S = 5.0
"""How long a client that has stalled may take the end of its stream before the connection is cut."""


class ClientStream:
    """Writes the events of a feed to a prepared response, until the job or something else ends it."""

    def __init__(
        self,
        gateway: Gateway,
        request: web.Request,
        response: web.StreamResponse,
        feed: Feed,
        framing: Framing,
        caller: Caller,
    ) -> None:
        self._gateway = gateway
        self._settings = gateway.settings.gateway
        self._response = response
        self._out = Outbound(request, self._settings.stall_s, lambda: self.close("stalled"))
        self._feed = feed
        self._framing = framing
        self._caller = caller
        self._loop = asyncio.get_running_loop()
        self._is_chunked = request.version >= HttpVersion11
        self._limit = asyncio.timeout(None)
        self.reason: str | None = None
        """Why the stream is closed before the job's end."""
        self._is_open = True
        self._event_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> str:
        """Write until the end. Return the reason: `ended`, or that of the `closing` event."""
        with ExitStack() as stack:
            stack.callback(self._stop_timer)
            stack.enter_context(self._gateway.drain.stream(lambda: self.close("shutdown")))
            age = self._loop.call_later(lifetime_s(self._settings.max_stream_age_s), self.close, "age")
            stack.callback(age.cancel)
            if (expires_at := self._caller.expires_at) is not None:
                left_s = max(0.0, expires_at - self._gateway.clock.now_ms() / 1000)
                stack.callback(self._loop.call_later(left_s, self.close, "token_expired").cancel)
            self._write(self._framing.opening())
            self._arm()
            try:
                async with self._limit:
                    await self._deliver()
            except TimeoutError:
                if self.reason is None:
                    raise
            except FeedError:
                self.reason = "shutdown" if self._gateway.drain.is_draining else "error"
            finally:
                self._is_open = False
        if self.reason is None:
            await self._response.write_eof()
            return "ended"
        await self._say_goodbye(self.reason)
        return self.reason

    def close(self, reason: str) -> None:
        """End the stream with a `closing` event."""
        if self._is_open and self.reason is None:
            self.reason = reason
            self._limit.reschedule(self._loop.time())

    async def _deliver(self) -> None:
        feed, out, frame, push = self._feed, self._out, self._framing.event, self._push
        delivered = self._gateway.limits.delivered
        face = self._framing.face
        while not feed.is_over:
            event = feed.take() or await feed.next(push)
            if event is None:
                return
            frames = [frame(event)]
            size = len(frames[0])
            while size < BATCH_BYTES and (event := feed.take()) is not None:
                frames.append(data := frame(event))
                size += len(data)
            self._write(frames[0] if len(frames) == 1 else b"".join(frames))
            self._event_at = self._loop.time()
            delivered[face] += len(frames)
            if out.is_full:
                await out.drained()
            elif size >= BATCH_BYTES:
                await asyncio.sleep(0)  # a long replay must not block other streams

    def _push(self, event: FeedEvent) -> bool:
        """Write an event in the call of the reader; return whether the client takes more."""
        out = self._out
        data = self._framing.event(event)
        out.write(chunk(data) if self._is_chunked else data)
        self._event_at = self._loop.time()
        self._gateway.limits.delivered[self._framing.face] += 1
        return not out.is_full

    def _write(self, data: bytes) -> None:
        if data:
            self._out.write(chunk(data) if self._is_chunked else data)

    async def _say_goodbye(self, reason: str) -> None:
        value = {"type": "closing", "reason": reason, "retriable": reason != "token_expired"}
        data = self._framing.own(
            "closing", value, self._feed.cursor if self._framing.face == "ndjson" else None
        )
        end = b"0\r\n\r\n" if self._is_chunked else b""
        if reason != "stalled":
            self._write(data)
            await self._response.write_eof()
            return
        # The end waits behind what the client does not take: write it, do not wait, and cut the connection soon.
        self._write(data)
        self._out.write(end)
        self._response.force_close()
        self._loop.call_later(_LAST_WORD_S, self._out.abort)
        raise ConnectionResetError("the client has stalled")

    # Quiet streams

    def _arm(self) -> None:
        self._out.has_written = False
        self._timer = self._loop.call_later(self._settings.keep_alive_s, self._tick)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        if not self._gateway.authenticator.is_valid(self._caller):
            self.close("token_expired")
            return
        now = self._loop.time()
        if self._out.is_waiting or self._out.has_written:
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
