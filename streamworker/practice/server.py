"""The practice upstream: an OpenAI-compatible server whose behaviour the model name selects."""

from __future__ import annotations

import asyncio
import hmac
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import parse_qs, urlsplit

from streamworker.practice import text
from streamworker.practice.answering import give
from streamworker.practice.calls import Call, CallLog
from streamworker.practice.errors import error_body
from streamworker.practice.limits import CallLimiter, Excess, Limits, Luck, Mishaps
from streamworker.practice.moves import Answer
from streamworker.practice.peer import BadRequestError, ClientGoneError, Peer, Request
from streamworker.practice.request import ChatRequest, RefusedError, parse_json, read
from streamworker.practice.script import Script, ScriptError, parse

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable

    from streamworker.practice.calls import Outcome

_BACKLOG: Final = 4096  # a thousand clients may connect at once
_MAX_COUNTED_MODELS: Final = 10_000
_MODELS: Final = ("practice", "practice?deltas=200&pace_ms=20", "practice?deltas=20&break_after=5")


class PracticeUpstream:
    """A server in this event loop. Use it as an async context manager, or with `start()` and `stop()`.

    `api_key`: the required bearer key; None accepts any. `limits` are enforced; `mishaps` are random faults. `maxlen`:
    number of calls kept in `calls`. `content_limit`: characters of the answer kept per call, 0 for none.
    """

    def __init__(
        self,
        *,
        api_key: str | None = None,
        limits: Limits | None = None,
        mishaps: Mishaps | None = None,
        maxlen: int = 100_000,
        content_limit: int = 65_536,
    ) -> None:
        self._api_key = api_key
        self._limiter = CallLimiter(limits or Limits())
        self._luck = Luck(mishaps or Mishaps())
        self._content_limit = content_limit
        self._log = CallLog(maxlen)
        self._seen: OrderedDict[str, int] = OrderedDict()
        self._server: asyncio.Server | None = None
        self._connections: dict[asyncio.Task[None], Peer] = {}
        self._host = ""
        self._port = 0
        self._is_dead = False

    @property
    def calls(self) -> deque[Call]:
        """The latest calls, oldest first, including those in progress."""
        return self._log.latest

    @property
    def open_streams(self) -> int:
        """Number of calls being answered now."""
        return self._log.open

    @property
    def max_open(self) -> int:
        """Maximum number of calls being answered at once."""
        return self._log.max_open

    @property
    def max_streams(self) -> int:
        """Maximum number of calls within the limits being answered at once."""
        return self._limiter.peak

    @property
    def exceeded(self) -> dict[str, int]:
        """Number of calls that exceeded a limit, by limit."""
        return dict(self._log.exceeded)

    @property
    def port(self) -> int:
        """The port that the server listens on."""
        if not self._port:
            raise RuntimeError("the practice upstream is not started")
        return self._port

    @property
    def base_url(self) -> str:
        """The base URL for clients; it ends in /v1."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/v1"

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition on the log, which is evaluated whenever a call starts or ends.

        A client may see the last byte of its answer before the log records the end of the call.
        """
        await self._log.until(condition)

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Start listening. Port 0 selects a free port."""
        self._host = host
        self._server = await asyncio.start_server(self._connected, host, port, backlog=_BACKLOG)
        self._port = int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Close every connection and wait for every task."""
        self._port = 0
        server, self._server = self._server, None
        if server is not None:
            await self._close(server)

    async def die(self, seconds: float) -> None:
        """Reset every connection, refuse new ones for `seconds`, then listen again on the same port."""
        server, self._server = self._server, None
        if server is None:
            raise RuntimeError("the practice upstream is not started")
        host, port, self._is_dead = self._host, self._port, True
        for peer in self._connections.values():
            peer.reset()
        try:
            await self._close(server)
            await asyncio.sleep(seconds)
        finally:
            self._is_dead = False
        if self._port:  # the server was not stopped meanwhile
            await self.start(host, port)

    async def _close(self, server: asyncio.Server) -> None:
        server.close()
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
        await server.wait_closed()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        task = asyncio.create_task(self._connection(peer))
        self._connections[task] = peer
        task.add_done_callback(self._connections.pop)

    async def _connection(self, peer: Peer) -> None:
        try:
            await self._requests(peer)
        except BadRequestError as error:
            await peer.refuse(error.status, error_body(str(error), "invalid_request_error"))
        except ClientGoneError:
            pass
        finally:
            await peer.close()

    async def _requests(self, peer: Peer) -> None:
        while request := await peer.next_request():
            await self._route(peer, request)
            if not peer.reuse():
                return

    async def _route(self, peer: Peer, request: Request) -> None:
        url = urlsplit(request.target)
        match request.method, url.path:
            case "POST", "/v1/chat/completions":
                await self._chat(peer, request)
            case "GET", "/v1/models":
                await self._list_models(peer, request)
            case "GET", "/calls":
                await peer.reply_json(200, self.summary(_limit(url.query)))
            case "GET", "/healthz":
                await peer.reply(200, "text/plain", b"ok\n")
            case method, path:
                refused = RefusedError(404, f"Unknown request: {method} {path}", "not_found")
                await peer.reply_json(404, refused.body)

    async def _list_models(self, peer: Peer, request: Request) -> None:
        try:
            self._authorize(self._call(request))
        except RefusedError as refused:
            await peer.reply_json(refused.status, refused.body)
        else:
            await peer.reply_json(200, _models())

    def summary(self, limit: int = 100) -> dict[str, Any]:
        """Return the figures of the log and its latest calls, as GET /calls does."""
        return self._log.summary(limit) | {"max_streams": self.max_streams}

    async def _chat(self, peer: Peer, request: Request) -> None:
        call = self._call(request)
        self._log.start(call)
        outcome: Outcome = "stopped"
        try:
            async with peer.watched():
                outcome = await self._answered(peer, request, call)
        except ClientGoneError:
            outcome = "client_closed"
            raise
        finally:
            call.first_byte_at = peer.first_byte_at
            self._log.end(call, "died" if self._is_dead else outcome, _now())

    def _call(self, request: Request) -> Call:
        headers = dict(request.headers)
        if "authorization" in headers:
            headers["authorization"] = self._judge(headers["authorization"])
        path = urlsplit(request.target).path
        return Call(path=path, headers=headers, started_at=_now(), content_limit=self._content_limit)

    def _judge(self, authorization: str) -> str:
        if self._api_key is None:
            return "present"
        right = hmac.compare_digest(authorization.encode(), f"Bearer {self._api_key}".encode())
        return "matched" if right else "wrong"

    async def _answered(self, peer: Peer, request: Request, call: Call) -> Outcome:
        try:
            self._authorize(call)
            call.body = parse_json(request.body)
            chat = read(call.body)
            call.model = chat.model
            answer = self._answer(chat, call)
        except RefusedError as refused:
            call.status = refused.status
            await peer.reply_json(refused.status, refused.body)
            return "refused"
        tokens = text.prompt_tokens(chat.messages) + answer.total
        if excess := self._limiter.enter(_now(), tokens):
            return await self._limited(peer, call, excess)
        try:
            return await give(peer, call, answer)
        finally:
            self._limiter.leave()

    async def _limited(self, peer: Peer, call: Call, excess: Excess) -> Outcome:
        call.status, call.exceeded = 429, excess.limit
        message = f"The limit of {excess.limit.replace('_', ' ')} is reached."
        body = error_body(message, "rate_limit_error", "rate_limit_exceeded")
        await peer.reply_json(429, body, excess.headers)
        return "limited"

    def _authorize(self, call: Call) -> None:
        if self._api_key is not None and call.headers.get("authorization") != "matched":
            raise RefusedError(401, "Incorrect API key provided.", "invalid_api_key")

    def _answer(self, chat: ChatRequest, call: Call) -> Answer:
        try:
            script = parse(chat.model)
            choices = script.choices or chat.choices
            text.check(script, choices)
        except ScriptError as error:
            raise RefusedError(400, f"Model {chat.model!r}: {error}", "invalid_model", "model") from error
        script = self._as_often_as_asked(script, chat.model)
        script, call.mishap = self._luck.befall(script, text.count(script, choices))
        return Answer(answer_id=f"chatcmpl-{call.number}", script=script, chat=chat, choices=choices)

    def _as_often_as_asked(self, script: Script, model: str) -> Script:
        """Return the script, without its fault after `times` calls."""
        if script.times is None:
            return script
        seen = self._seen[model] = self._seen.pop(model, 0) + 1
        if len(self._seen) > _MAX_COUNTED_MODELS:
            self._seen.popitem(last=False)
        return script if seen <= script.times else script.well()


async def serve(
    upstream: PracticeUpstream,
    host: str,
    port: int,
    *,
    started: Callable[[PracticeUpstream], None] | None = None,
    dies_after_s: float | None = None,
    dies_for_s: float = 10.0,
) -> None:
    """Serve until cancelled. `started` is called when the server listens, for example to print its `base_url`."""
    await upstream.start(host, port)
    try:
        if started is not None:
            started(upstream)
        if dies_after_s is not None:
            await asyncio.sleep(dies_after_s)
            await upstream.die(dies_for_s)
        await asyncio.get_running_loop().create_future()
    finally:
        await upstream.stop()


def _limit(query: str) -> int:
    asked = parse_qs(query).get("limit", ["100"])[0]
    return int(asked) if asked.isascii() and asked.isdigit() else 100


def _models() -> dict[str, Any]:
    return {
        "object": "list",
        "data": [{"id": name, "object": "model", "owned_by": "practice"} for name in _MODELS],
    }


def _now() -> float:
    return asyncio.get_running_loop().time()
