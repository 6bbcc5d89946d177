"""The practice upstream: an OpenAI-compatible server that does what the model name asks for."""

from __future__ import annotations

import asyncio
import hmac
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final, Self
from urllib.parse import parse_qs, urlsplit

from streamworker.practice import text
from streamworker.practice.calls import Call, CallLog
from streamworker.practice.peer import BadRequestError, ClientGoneError, Peer, Request
from streamworker.practice.request import ChatRequest, RefusedError, error_kind, parse_json, read
from streamworker.practice.script import Script, ScriptError, parse
from streamworker.practice.stream import Answer, Player
from streamworker.practice.wire import HTML, completion, error_body

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable

    from streamworker.practice.calls import Outcome

_BACKLOG: Final = 4096  # a thousand clients may connect in one breath
_MAX_COUNTED_MODELS: Final = 10_000
_MODELS: Final = ("practice", "practice?deltas=200&pace_ms=20", "practice?deltas=20&break_after=5")


class PracticeUpstream:
    """A server in this event loop; use it as an async context manager, or with start() and stop().

    `api_key`: the bearer it demands; None takes any. `maxlen`: calls kept in `calls`. `content_limit`:
    characters of what was sent kept per call, 0 for none.
    """

    def __init__(
        self, *, api_key: str | None = None, maxlen: int = 100_000, content_limit: int = 65_536
    ) -> None:
        self._api_key = api_key
        self._content_limit = content_limit
        self._log = CallLog(maxlen)
        self._seen: OrderedDict[str, int] = OrderedDict()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._host = ""

    @property
    def calls(self) -> deque[Call]:
        """The latest calls, oldest first, those under way included."""
        return self._log.latest

    @property
    def open_streams(self) -> int:
        """Calls being answered now."""
        return self._log.open

    @property
    def max_open(self) -> int:
        """The most calls that were ever being answered at once."""
        return self._log.max_open

    @property
    def port(self) -> int:
        """The port it listens on."""
        if self._server is None:
            raise RuntimeError("the practice upstream is not started")
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def base_url(self) -> str:
        """What a client takes as base URL; ends in /v1."""
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self.port}/v1"

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition on the log; it is looked at whenever a call starts or ends.

        A client sees the last byte of its answer before the log says that the call has ended.
        """
        await self._log.until(condition)

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; port 0 takes a free one."""
        self._host = host
        self._server = await asyncio.start_server(self._connected, host, port, backlog=_BACKLOG)

    async def stop(self) -> None:
        """Close every connection, wait for every task."""
        server, self._server = self._server, None
        if server is None:
            return
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
        task = asyncio.create_task(self._connection(Peer(reader, writer)))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

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
                await peer.reply_json(200, self._log.summary(_limit(url.query)))
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
            self._log.end(call, outcome, _now())

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
            answer = self._answer(chat, call.number)
        except RefusedError as refused:
            call.status = refused.status
            await peer.reply_json(refused.status, refused.body)
            return "refused"
        return await _play(peer, call, answer)

    def _authorize(self, call: Call) -> None:
        if self._api_key is not None and call.headers.get("authorization") != "matched":
            raise RefusedError(401, "Incorrect API key provided.", "invalid_api_key")

    def _answer(self, chat: ChatRequest, number: int) -> Answer:
        try:
            script = parse(chat.model)
            choices = script.choices or chat.choices
            text.check(script, choices)
        except ScriptError as error:
            raise RefusedError(400, f"Model {chat.model!r}: {error}", "invalid_model", "model") from error
        script = self._as_often_as_asked(script, chat.model)
        return Answer(answer_id=f"chatcmpl-{number}", script=script, chat=chat, choices=choices)

    def _as_often_as_asked(self, script: Script, model: str) -> Script:
        """The script, without what goes wrong once that has happened `times` times."""
        if script.times is None:
            return script
        seen = self._seen[model] = self._seen.pop(model, 0) + 1
        if len(self._seen) > _MAX_COUNTED_MODELS:
            self._seen.popitem(last=False)
        return script if seen <= script.times else script.well()


async def serve(
    host: str,
    port: int,
    *,
    api_key: str | None = None,
    started: Callable[[PracticeUpstream], None] | None = None,
) -> None:
    """Serve until cancelled. `started` is called once it listens (to say where: `base_url`)."""
    upstream = PracticeUpstream(api_key=api_key, maxlen=1_000, content_limit=0)
    await upstream.start(host, port)
    try:
        if started is not None:
            started(upstream)
        await asyncio.get_running_loop().create_future()
    finally:
        await upstream.stop()


async def _play(peer: Peer, call: Call, answer: Answer) -> Outcome:
    script = answer.script
    await peer.pause(script.slow_headers_ms / 1000)
    call.status = script.status or 200
    if script.status is not None:
        await peer.reply_json(
            script.status, _scripted_error(script.status, script.code), _retry_headers(script)
        )
        return "fault"
    if script.html200:
        await peer.reply(200, "text/html; charset=utf-8", HTML)
        return "fault"
    if answer.chat.stream and not script.json200:
        return await Player(peer, call, answer).play()
    await peer.reply_json(200, _whole(answer, call))
    return "fault" if script.json200 else "completed"


def _scripted_error(status: int, code: str | None) -> dict[str, Any]:
    return error_body(f"The practice upstream answers {status}, as it was told to.", error_kind(status), code)


def _retry_headers(script: Script) -> list[tuple[str, str]]:
    headers = [("retry-after", script.retry_after)] if script.retry_after else []
    if script.retry_after_ms is not None:
        headers.append(("retry-after-ms", f"{script.retry_after_ms:g}"))
    return headers


def _whole(answer: Answer, call: Call) -> dict[str, Any]:
    for piece in answer.pieces():
        call.sent(piece.choice, piece.text)
    if answer.script.usage != "none":
        call.usage_sent = answer.usage(call.deltas_sent)
    said = [text.message(answer.script, answer.chat.messages, choice) for choice in range(answer.choices)]
    return completion(answer.answer_id, answer.script.name, said, answer.finish_reason, call.usage_sent)


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
