"""A gateway that follows a script: the page's states that are hard to reach with real workers, without a broker."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Self

from aiohttp import WSMsgType, web

from streamworker.gateway import page_files

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

__all__ = ["ATTEMPT", "KEY", "NOT_STARTED", "FakeGateway", "delta", "started", "usage"]

ATTEMPT = "a1"

KEY = "swk_fake"

NOT_STARTED = {"queued": 40, "first_delta": None, "total": 0}
"""The timing of a job that ended before its first delta."""


def started(job_id: str, attempt: str = ATTEMPT, **members: Any) -> dict[str, Any]:
    """Return the first event of an attempt."""
    return {
        "type": "started",
        "v": 1,
        "job_id": job_id,
        "attempt": attempt,
        "seq": 0,
        "ts": _ms(),
        "model": "apertus-70b-instruct",
        "upstream": "default",
        "cause": "new",
        "metadata": {},
        **members,
    }


def delta(
    job_id: str, seq: int, content: str | None = None, attempt: str = ATTEMPT, **members: Any
) -> dict[str, Any]:
    """Return a delta with this content, or with the members of a delta."""
    inner = members or {"content": content}
    return {
        "type": "delta",
        "v": 1,
        "job_id": job_id,
        "attempt": attempt,
        "seq": seq,
        "ts": _ms(),
        "choice": 0,
        "delta": inner,
        "finish_reason": None,
    }


def usage(
    job_id: str, seq: int, status: str = "completed", attempt: str = ATTEMPT, **members: Any
) -> dict[str, Any]:
    """Return a terminal event."""
    return {
        "type": "usage",
        "v": 1,
        "job_id": job_id,
        "attempt": attempt,
        "seq": seq,
        "ts": _ms(),
        "status": status,
        "finish_reasons": {"0": "stop"},
        "usage_source": "upstream",
        "error": None,
        "usage": {"prompt_tokens": 15, "completion_tokens": 29},
        "tries": 1,
        "timing": {"queued": 40, "first_delta": 312, "total": 4200},
        **members,
    }


def _ms() -> int:
    return int(time.time() * 1000)


class FakeGateway:
    """An async context manager. `on_submit(gateway, connection, id, job_id, job)` plays the events of a job."""

    def __init__(self, *, is_open: bool = True) -> None:
        self.is_open = is_open
        self.credentials = {KEY, "token"}
        self.confirms = True
        """Whether submissions are answered."""
        self.cancels = True
        """Whether callers may cancel."""
        self.received: list[dict[str, Any]] = []
        self.requests: list[tuple[str, str]] = []
        self.connections: list[web.WebSocketResponse] = []
        self.logs: dict[str, list[dict[str, Any]]] = {}
        """Events by job id: what a subscription replays before it is live."""
        self.on_submit: Callable[[str], Awaitable[None]] | None = None
        self.url = ""
        self.port = 0
        self._subscribers: dict[str, list[tuple[web.WebSocketResponse, str]]] = {}
        self._changed = asyncio.Condition()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._count = 0
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await self.stop()

    async def start(self) -> None:
        """Listen, on the same port as before."""
        app = web.Application()
        app.add_routes(page_files.routes())
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.get("/v1/ws", self._websocket),
                web.post("/v1/tokens", self._tokens),
                web.get("/v1/jobs/{id}/events", self._events),
                web.get("/v1/jobs/{id}", self._job),
                web.post("/v1/jobs/{id}/cancel", self._cancel),
            ]
        )
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.2, access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self.port}/"

    async def stop(self) -> None:
        """Close all connections, and stop listening."""
        for connection in [*self.connections]:
            with contextlib.suppress(ConnectionError):
                await connection.close(code=1012)
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # Script

    async def publish(self, *events: dict[str, Any]) -> None:
        """Append events to the logs of their jobs, and send them to all readers."""
        for event in events:
            job_id = event["job_id"]
            log = self.logs.setdefault(job_id, [])
            log.append(event)
            for connection, name in self._subscribers.get(job_id, []):
                await _send(connection, _message(name, len(log), event))
        async with self._changed:
            self._changed.notify_all()

    async def publish_text(self, job_id: str, text: str, first_seq: int = 1, attempt: str = ATTEMPT) -> int:
        """Publish a text as deltas of one word; return the next `seq`."""
        words = [word + " " for word in text.split(" ")]
        for seq, word in enumerate(words, first_seq):
            await self.publish(delta(job_id, seq, word, attempt))
        return first_seq + len(words)

    async def send(self, message: dict[str, Any]) -> None:
        """Send a message on all connections."""
        for connection in self.connections:
            await _send(connection, message)

    async def close(self, code: int) -> None:
        """Close all websockets with this code."""
        for connection in [*self.connections]:
            await connection.close(code=code)

    # Handlers

    async def _models(self, request: web.Request) -> web.Response:
        self.requests.append(("models", request.headers.get("Authorization", "")))
        if not self._knows(request.headers.get("Authorization", "").removeprefix("Bearer ")):
            return _error(401, "unauthenticated")
        names = ("apertus-70b-instruct", "apertus-8b-instruct", "practice")
        return web.json_response({"object": "list", "data": [{"id": name} for name in names]})

    def _knows(self, credential: str) -> bool:
        return self.is_open or credential in self.credentials

    async def _tokens(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(("tokens", json.dumps(body["jobs"])))
        expires_at = datetime.fromtimestamp(time.time() + 3600, UTC).isoformat()
        return web.json_response({"token": "token", "expires_at": expires_at}, status=201)

    async def _websocket(self, request: web.Request) -> web.WebSocketResponse:
        connection = web.WebSocketResponse(protocols=("streamworker.v1",), heartbeat=25)
        await connection.prepare(request)
        self.connections.append(connection)
        try:
            if self.is_open:
                await _send(connection, {"type": "welcome", "limits": {}})
            async for frame in connection:
                if frame.type is WSMsgType.TEXT:
                    await self._take(connection, json.loads(frame.data))
        finally:
            self.connections.remove(connection)
        return connection

    async def _take(self, connection: web.WebSocketResponse, message: dict[str, Any]) -> None:
        self.received.append(message)
        kind, name = message["type"], message.get("id")
        if kind in {"subscribe", "submit", "cancel"} and (connection, name) in [
            pair for pairs in self._subscribers.values() for pair in pairs
        ]:
            await connection.close(code=4400)
            return
        if kind == "auth":
            if not self._knows(message["token"]):
                await connection.close(code=4401)
                return
            await _send(connection, {"type": "welcome", "limits": {}})
        elif kind == "submit" and self.confirms:
            self._count += 1
            job_id = message["job"].get("job_id", f"0199f3c2-7a10-7c3e-9f00-{self._count:012x}")
            self.logs.setdefault(job_id, [])
            await _send(
                connection, {"type": "submitted", "id": message["id"], "job_id": job_id, "cursor": "0.0.w"}
            )
            self._subscribers.setdefault(job_id, []).append((connection, message["id"]))
            await _send(connection, {"type": "live", "id": message["id"]})
            if self.on_submit is not None:
                self._tasks.add(asyncio.ensure_future(self.on_submit(job_id)))
        elif kind == "subscribe":
            await self._subscribe(connection, message)
        elif kind == "cancel":
            await _send(connection, {"type": "cancelling", "id": message["id"]})
        elif kind == "ping":
            await _send(connection, {"type": "pong"})

    async def _subscribe(self, connection: web.WebSocketResponse, message: dict[str, Any]) -> None:
        job_id, name = message["job_id"], message["id"]
        if job_id not in self.logs:
            text = f"job {job_id} was not found"
            await _send(
                connection,
                {"type": "error", "id": name, "error": {"code": "job_not_found", "message": text}},
            )
            return
        first = _position(message.get("cursor"))
        for number, event in enumerate(self.logs[job_id][first:], first + 1):
            await _send(connection, _message(name, number, event))
        self._subscribers.setdefault(job_id, []).append((connection, name))
        await _send(connection, {"type": "live", "id": name})

    async def _job(self, request: web.Request) -> web.Response:
        if request.match_info["id"] not in self.logs:
            return _not_found(request)
        return web.json_response({"status": "running"})

    async def _cancel(self, request: web.Request) -> web.Response:
        self.requests.append(("cancel", request.match_info["id"]))
        if not self.cancels:
            return _error(403, "forbidden", "the key has no scope cancel")
        return web.json_response({"job_id": request.match_info["id"], "cancelling": True}, status=202)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        job_id = request.match_info["id"]
        self.requests.append(("events", request.headers.get("Last-Event-ID", "")))
        if job_id not in self.logs:
            return _not_found(request)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"retry: 200\n\n")
        sent = _position(request.headers.get("Last-Event-ID"))
        while True:
            for event in self.logs[job_id][sent:]:
                sent += 1
                block = f"event: {event['type']}\nid: 0.{sent}.0.0\ndata: {json.dumps(event)}\n\n"
                await response.write(block.encode())
                if event["type"] == "usage":
                    return response
            async with self._changed:
                while len(self.logs[job_id]) == sent:
                    await self._changed.wait()


def _position(cursor: str | None) -> int:
    return 0 if cursor is None or cursor.endswith(".w") else int(cursor.split(".")[1])


def _message(name: str, number: int, event: dict[str, Any]) -> dict[str, Any]:
    return {"type": "event", "id": name, "cursor": f"0.{number}.{event['seq']}.0", "event": event}


async def _send(connection: web.WebSocketResponse, message: dict[str, Any]) -> None:
    with contextlib.suppress(ConnectionError):
        await connection.send_str(json.dumps(message))


def _not_found(request: web.Request) -> web.Response:
    return _error(404, "job_not_found", f"job {request.match_info['id']} was not found")


def _error(status: int, code: str, message: str = "") -> web.Response:
    error = {"message": message, "code": code, "retriable": False}
    return web.json_response({"error": error}, status=status)
