"""Clients of two gateways by the thousand: each follows one job after the other, and resumes at the other gateway when it is cut.

A client of server-sent events is a raw asyncio protocol, so that 5,000 of them fit beside the gateways on two cores.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

from websockets.asyncio.client import connect as connect_typed
from websockets.exceptions import InvalidHandshake, WebSocketException

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

__all__ = ["Got", "Job", "Jobs", "Replica", "SseClient", "Stream", "WebsocketClient"]

connect: Any = connect_typed

RETRY_S = (1.0, 5.0)
"""How long a client waits before it connects again if the gateway has not said it; drawn for each cut."""

REPLAY_S = 1.0
"""How long after a connection deltas may be replayed ones."""

END = ".end"
_RETRY = re.compile(rb"retry: (\d+)\n")


class Job(NamedTuple):
    """A job that clients may follow, and the cursor from its submission."""

    job_id: str
    cursor: str


class Got(NamedTuple):
    """What a client keeps of an event."""

    attempt: str
    seq: int
    digest: int
    """CRC-32 of the record's value."""


class Stream:
    """What one client has received of one job. `cursors` are those with which it has connected again."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.cursor = job.cursor
        self.events: list[Got] = []
        self.opened_at = 0.0
        """When the client has connected or subscribed, on the loop's clock."""
        self.retry_s: float | None = None
        """How long to wait before the next connection, as the gateway has said."""
        self.is_over = False
        self.faults: list[str] = []

    def take(self, cursor: str, value: bytes) -> None:
        """Note an event."""
        if self.is_over:
            self.faults.append(f"{cursor} came behind the terminal event")
        self.cursor = cursor
        parts = cursor.split(".")
        self.events.append(Got(parts[3], int(parts[2]), crc32(value)))
        self.is_over = cursor.endswith(END)


class Replica:
    """Where a gateway listens. `cursors` are those with which clients have connected since it was cleared."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.cursors: list[str] = []


class Jobs:
    """The jobs that clients may follow, and the streams that are over."""

    def __init__(self, replicas: tuple[Replica, Replica], chance: random.Random) -> None:
        self.replicas = replicas
        self.chance = chance
        self.open: dict[str, Job] = {}
        self.changed = asyncio.Condition()
        self.is_closing = False
        self.streams: list[Stream] = []
        self.delays: list[int] | None = None
        """While this is a list, the ms from each delta's `ts` to its arrival are appended."""
        self.now_ms: Callable[[], int]
        self.cuts = 0
        self.closings = 0
        self.refusals: list[str] = []
        self.following = 0
        """Clients whose stream is open and has delivered an event since it was opened."""

    async def next(self) -> Job | None:
        """Return one of the newest open jobs; wait if there is none. None when the run is to end."""
        async with self.changed:
            await self.changed.wait_for(lambda: self.open or self.is_closing)
        if self.is_closing:
            return None
        newest = list(self.open.values())[-10:]
        return self.chance.choice(newest)

    def taken(self, stream: Stream, kind: bytes, value: bytes) -> None:
        """Measure the delay of a delta, unless it may be replayed."""
        if self.delays is None or kind != b"delta":
            return
        if asyncio.get_running_loop().time() - stream.opened_at > REPLAY_S:
            at = value.index(b'"ts":') + 5
            self.delays.append(self.now_ms() - int(value[at : at + 13]))

    def other(self, replica: Replica) -> Replica:
        """Return the other gateway."""
        return self.replicas[self.replicas[0] is replica]

    async def pause(self, retry_s: float | None = None) -> None:
        """Wait before a client connects again, as long as the gateway has said."""
        await asyncio.sleep(self.chance.uniform(*RETRY_S) if retry_s is None else retry_s)


class _Response(asyncio.Protocol):
    """One GET of an event stream: it takes the chunks apart, then the events."""

    def __init__(self, jobs: Jobs, stream: Stream, request: bytes) -> None:
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.status = 0
        self.has_event = False
        self.is_whole = False
        """Whether the body was complete."""
        self.closing = b""
        self._jobs = jobs
        self._stream = stream
        self._request = request
        self._unread = b""
        self._events = b""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._unread += data
        if not self.status and not self._read_head():
            return
        while (at := self._unread.find(b"\r\n")) >= 0:
            size = int(self._unread[:at], 16)
            end = at + 2 + size
            if len(self._unread) < end + 2:
                return
            body, self._unread = self._unread[at + 2 : end], self._unread[end + 2 :]
            if not size:
                self.is_whole = True
                self._transport.close()
                return
            self._read_events(body)

    def connection_lost(self, _: Exception | None) -> None:
        if self.has_event:
            self._jobs.following -= 1
        if not self.ended.done():
            self.ended.set_result(None)

    def _read_head(self) -> bool:
        head, found, rest = self._unread.partition(b"\r\n\r\n")
        if not found:
            return False
        self.status, self._unread = int(head[9:12]), rest
        if self.status != 200 or b"chunked" not in head.lower():
            self.closing = rest
            if said := _RETRY.search(rest):
                self._stream.retry_s = int(said[1]) / 1000
            self._transport.close()
            return False
        return True

    def _read_events(self, body: bytes) -> None:
        *blocks, self._events = (self._events + body).split(b"\n\n")
        for block in blocks:
            kind = cursor = value = b""
            for line in block.split(b"\n"):
                if line.startswith(b"event: "):
                    kind = line[7:]
                elif line.startswith(b"id: "):
                    cursor = line[4:]
                elif line.startswith(b"data: "):
                    value = line[6:]
                elif line.startswith(b"retry: "):
                    self._stream.retry_s = int(line[7:]) / 1000
            self._take(kind, cursor.decode(), value)

    def _take(self, kind: bytes, cursor: str, value: bytes) -> None:
        if kind == b"closing":
            self.closing = value
        elif kind == b"position":
            self._stream.cursor = cursor
        elif kind:
            if not self.has_event:
                self.has_event = True
                self._jobs.following += 1
            self._stream.take(cursor, value)
            self._jobs.taken(self._stream, kind, value)


class SseClient:
    """Follows jobs over server-sent events, as EventSource does: it connects again with the id of its last event."""

    def __init__(self, jobs: Jobs, replica: Replica, *, checks_end: bool) -> None:
        """`checks_end`: connect once more behind the terminal event, which must be answered with 204."""
        self._jobs = jobs
        self._replica = replica
        self._checks_end = checks_end

    async def run(self) -> None:
        """Follow one job after the other until the run ends."""
        while (job := await self._jobs.next()) is not None:
            stream = Stream(job)
            while not stream.is_over:
                await self._follow(stream)
            if self._checks_end:
                await self._check_end(stream)
            self._jobs.streams.append(stream)

    async def _follow(self, stream: Stream) -> None:
        jobs = self._jobs
        response = await self._get(stream)
        if stream.is_over:
            return
        if response is not None and response.status not in {0, 200, 503}:
            stream.faults.append(f"status {response.status}: {response.closing[:200]!r}")
            stream.is_over = True
            return
        if response is not None and response.closing:
            jobs.closings += 1
        else:
            jobs.cuts += 1
        self._replica = jobs.other(self._replica)
        await jobs.pause(stream.retry_s)

    async def _check_end(self, stream: Stream) -> None:
        cursor = stream.cursor
        while (response := await self._get(stream)) is None or response.status in {0, 503}:
            self._replica = self._jobs.other(self._replica)
            await self._jobs.pause()
        if response.status != 204:
            stream.faults.append(f"{cursor} was answered with {response.status}, not 204")

    async def _get(self, stream: Stream) -> _Response | None:
        request = (
            f"GET /v1/jobs/{stream.job.job_id}/events HTTP/1.1\r\nHost: gateway\r\n"
            f"Accept: text/event-stream\r\nLast-Event-ID: {stream.cursor}\r\n\r\n"
        ).encode()
        loop = asyncio.get_running_loop()
        try:
            transport, response = await loop.create_connection(
                lambda: _Response(self._jobs, stream, request), "127.0.0.1", self._replica.port
            )
        except OSError:
            return None
        self._replica.cursors.append(stream.cursor)
        stream.opened_at = loop.time()
        try:
            await response.ended
        finally:
            transport.abort()
        return response


class WebsocketClient:
    """Follows several jobs at once on one websocket."""

    def __init__(self, jobs: Jobs, replica: Replica, subscriptions: int) -> None:
        self._jobs = jobs
        self._replica = replica
        self._count = subscriptions
        self._streams: dict[str, Stream] = {}
        self._numbers = 0
        self._retry_s: float | None = None

    async def run(self) -> None:
        """Follow jobs until the run ends and those of this client have ended."""
        jobs = self._jobs
        while not jobs.is_closing or self._streams:
            try:
                async with connect(
                    f"ws://127.0.0.1:{self._replica.port}/v1/ws",
                    subprotocols=["streamworker.v1"],
                    proxy=None,
                    compression=None,
                    open_timeout=30,
                ) as socket:
                    await self._converse(socket)
            except (OSError, TimeoutError, EOFError, WebSocketException, InvalidHandshake):
                jobs.cuts += 1
            self._replica = jobs.other(self._replica)
            await jobs.pause(self._retry_s)
            self._retry_s = None

    async def _converse(self, socket: Any) -> None:
        for name, stream in self._streams.items():
            await self._subscribe(socket, name, stream)
        while True:
            await self._fill(socket)
            if not self._streams:
                return
            message: bytes = await socket.recv(decode=False)
            if message.startswith(b'{"type":"event"'):
                self._take(message)
            elif self._ends(json.loads(message)):
                return

    async def _fill(self, socket: Any) -> None:
        while len(self._streams) < self._count and (job := await self._jobs.next()) is not None:
            self._numbers += 1
            name = str(self._numbers)
            self._streams[name] = Stream(job)
            await self._subscribe(socket, name, self._streams[name])

    async def _subscribe(self, socket: Any, name: str, stream: Stream) -> None:
        self._replica.cursors.append(stream.cursor)
        stream.opened_at = asyncio.get_running_loop().time()
        message = {"type": "subscribe", "id": name, "job_id": stream.job.job_id, "cursor": stream.cursor}
        await socket.send(json.dumps(message))

    def _take(self, message: bytes) -> None:
        head, _, event = message.partition(b',"event":')
        facts = json.loads(head + b"}")
        value = event[:-1]
        stream = self._streams[facts["id"]]
        stream.take(facts["cursor"], value)
        self._jobs.taken(stream, b"delta" if b'"type":"delta"' in value else b"", value)

    def _ends(self, message: dict[str, Any]) -> bool:
        """Take a message that is not an event; return whether the connection is of no more use."""
        kind = message["type"]
        if kind == "end" and message["reason"] == "ended":
            self._jobs.streams.append(self._streams.pop(message["id"]))
        elif kind == "closing":
            self._jobs.closings += 1
            self._retry_s = message["reconnect_after_ms"] / 1000
        elif kind in {"error", "end"}:
            error = message.get("error", {})
            stream = self._streams.get(message.get("id", ""))
            if stream is not None and error and not error.get("retriable"):
                stream.faults.append(f"{error}")
                self._jobs.streams.append(self._streams.pop(message["id"]))
            return True
        return False
