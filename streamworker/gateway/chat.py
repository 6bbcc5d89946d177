"""`/v1/chat/completions`: a job that its client waits for, in the format of OpenAI's API."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog
from aiohttp import web

from streamworker.gateway.chat_body import BodyWriter
from streamworker.gateway.chat_completion import ChatCompletion
from streamworker.gateway.chat_request import InvalidChatRequest, read_request
from streamworker.gateway.chat_stream import PING, ChatStream
from streamworker.gateway.errors import ApiError
from streamworker.gateway.feed_errors import api_error
from streamworker.gateway.feeds import FeedError
from streamworker.gateway.gateway import JOB_ID
from streamworker.gateway.models import is_served, unknown_model
from streamworker.gateway.requests import read_body
from streamworker.telemetry import gateway_metrics as table
from streamworker.wire.event import rfc3339

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamworker.gateway.auth import Caller
    from streamworker.gateway.chat_request import ChatRequest
    from streamworker.gateway.feeds import Feed, FeedEvent
    from streamworker.gateway.gateway import Gateway
    from streamworker.gateway.jobs import Submitted

__all__ = ["routes"]

STATUS_HOLD_S: Final = 50.0
"""How long an answer without `stream` keeps its HTTP status open. Many proxies cut a silent connection after 60 s."""

DEADLINE_GRACE_S: Final = 5.0
"""How long after its deadline a job may still end: there may be no worker that could end it."""

_FACE: Final = "chat"
_MAX_BATCH_BYTES: Final = 1 << 16
_LEFT: Final = "the client of the chat completion disconnected"

log = structlog.get_logger()


def routes(gateway: Gateway) -> list[web.RouteDef]:
    """Return the routes of this module."""
    return [web.post("/v1/chat/completions", _Handlers(gateway).complete)]


class _Handlers:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._settings = gateway.settings.gateway
        self._clients: Counter[str] = Counter()
        """Open requests per job: an SDK's retry joins the job of its former try."""
        self._cancelling: set[asyncio.Future[None]] = set()

    async def complete(self, request: web.Request) -> web.StreamResponse:
        gateway = self._gateway
        caller = gateway.authenticator.require(request, "submit")
        body = await read_body(request)
        chat = self._read(request, body)
        if not is_served(gateway.settings, chat.model):
            raise unknown_model(chat.model)
        gateway.require_broker()
        with gateway.limits.stream(caller, _FACE):
            submitting = asyncio.ensure_future(self._submit(request, caller, body, chat))
            submitting.add_done_callback(_retrieve)
            try:
                submitted = await asyncio.shield(submitting)
                request[JOB_ID] = submitted.job_id
                with self._client(submitted.job_id):
                    response = await _Answer(gateway, request, chat, submitted).give()
                self._closed("ended")
            except (asyncio.CancelledError, ConnectionError):
                self._closed("disconnected" if not gateway.drain.is_over else "shutdown")
                if not gateway.drain.is_over:
                    await self._client_left(chat, submitting)
                raise
            except Abandoned as error:
                self._closed("error")
                await self._client_left(chat, submitting)
                return error.response
            except (ApiError, FeedError):
                self._closed("error")
                raise
            return response

    def _closed(self, reason: str) -> None:
        self._gateway.metrics.add(table.STREAMS_CLOSED, 1, _FACE, reason)

    def _read(self, request: web.Request, body: bytes) -> ChatRequest:
        settings = self._settings
        try:
            return read_request(
                body,
                request.headers,
                timeout_s=settings.chat_timeout_s,
                on_disconnect=settings.chat_on_disconnect,
            )
        except InvalidChatRequest as error:
            raise ApiError(
                400, "invalid_request", str(error), param=error.param, extra={"faults": error.faults}
            ) from None

    async def _submit(
        self, request: web.Request, caller: Caller, body: bytes, chat: ChatRequest
    ) -> Submitted:
        deadline_ms = self._gateway.clock.now_ms() + round(chat.timeout_s * 1000)
        job: dict[str, Any] = {
            "request": chat.body,
            "deadline": rfc3339(deadline_ms),
            "max_wait_s": self._settings.chat_max_wait_s,
            "metadata": {"gateway": _FACE},
        }
        return await self._gateway.jobs.submit_request(request, caller, body, job, face=_FACE)

    @contextmanager
    def _client(self, job_id: str) -> Iterator[None]:
        self._clients[job_id] += 1
        try:
            yield
        finally:
            self._clients[job_id] -= 1
            if not self._clients[job_id]:
                del self._clients[job_id]

    async def _client_left(self, chat: ChatRequest, submitting: asyncio.Future[Submitted]) -> None:
        """Cancel the job, unless it is to go on or another client waits for it."""
        if not chat.cancels:
            return
        # The handler may be cancelled while it waits for the broker.
        task = asyncio.ensure_future(self._cancel(submitting))
        self._cancelling.add(task)
        task.add_done_callback(self._cancelling.discard)
        await asyncio.shield(task)

    async def _cancel(self, submitting: asyncio.Future[Submitted]) -> None:
        try:
            job_id = (await submitting).job_id
            if job_id not in self._clients:
                await self._gateway.jobs.cancel(job_id, _LEFT, face=_FACE)
        except (ApiError, FeedError) as error:
            log.warning("gateway.cancel_failed", reason=str(error))


def _retrieve(submitting: asyncio.Future[Submitted]) -> None:
    """Retrieve an exception that no handler waits for any more."""
    if not submitting.cancelled():
        submitting.exception()


class Abandoned(Exception):
    """The response is over before the job is: no client will read the rest of it."""

    def __init__(self, response: web.StreamResponse) -> None:
        super().__init__("the response is over before the job is")
        self.response = response


class _Answer:
    """One response."""

    def __init__(
        self, gateway: Gateway, request: web.Request, chat: ChatRequest, submitted: Submitted
    ) -> None:
        self._gateway = gateway
        self._settings = gateway.settings.gateway
        self._request = request
        self._chat = chat
        self._submitted = submitted
        self._headers = {"Streamworker-Job-Id": submitted.job_id}
        if submitted.is_replayed:
            self._headers["Idempotent-Replay"] = "true"
        self._delivered = 0
        self._loop = asyncio.get_running_loop()
        self._gives_up_at = self._loop.time() + chat.timeout_s + DEADLINE_GRACE_S

    async def give(self) -> web.StreamResponse:
        """Answer the request. Raises ApiError as long as no HTTP status was sent."""
        job_id = self._submitted.job_id
        try:
            feed = await self._gateway.event_log.open(job_id, cursor=self._submitted.cursor)
            try:
                return await (self._stream(feed) if self._chat.is_stream else self._whole(feed))
            finally:
                feed.close()
                self._gateway.metrics.add(table.EVENTS_DELIVERED, self._delivered, _FACE)
        except FeedError as error:
            raise self._named(api_error(error)) from None
        except ApiError as error:
            raise self._named(error) from None

    def _named(self, error: ApiError) -> ApiError:
        """Add the job to an error: its events can still be read."""
        error.job_id = error.job_id or self._submitted.job_id
        error.headers |= self._headers
        return error

    # Streaming

    async def _stream(self, feed: Feed) -> web.StreamResponse:
        stream = ChatStream(
            self._submitted.job_id,
            include_usage=self._chat.include_usage,
            usage_place=self._settings.chat_usage,
        )
        frames = await self._until_delta(feed, stream)
        if stream.failure is not None:
            raise stream.failure
        body = await self._begin("text/event-stream; charset=utf-8", "no-store, no-transform")
        try:
            await self._follow(feed, stream, body, frames)
        except (FeedError, ApiError, msgspec.MsgspecError) as error:
            await body.write(stream.fail(self._named(_as_api_error(error))))
        await body.end()
        if feed.is_over:
            return body.response
        raise Abandoned(body.response)

    async def _until_delta(self, feed: Feed, stream: ChatStream) -> bytes:
        """Read until the HTTP status is known: the first delta, the job's end, or the time for it is over."""
        ends_at = self._loop.time() + self._settings.chat_status_hold_s
        frames = b""
        while not (stream.has_delta or stream.is_over):
            event = await self._next(feed, ends_at)
            if event is None:
                break
            frames += self._read(stream, event, merge=False)
        return frames

    async def _follow(self, feed: Feed, stream: ChatStream, body: BodyWriter, frames: bytes) -> None:
        """Write chunks until the stream is over."""
        while True:
            while not stream.is_over and len(frames) < _MAX_BATCH_BYTES:
                event = feed.take()
                if event is None:
                    break
                frames += self._read(stream, event, merge=body.is_behind)
            frames += stream.flush()
            if frames:
                await body.write(frames)
            if stream.is_over:
                return
            event = await self._next(feed, self._loop.time() + self._settings.keep_alive_s)
            frames = PING if event is None else self._read(stream, event, merge=body.is_behind)

    def _read(self, stream: ChatStream, event: FeedEvent, *, merge: bool) -> bytes:
        self._delivered += 1
        match event.kind:
            case "delta":
                return stream.delta(event.value, merge=merge)
            case "started":
                return stream.started(event.value)
            case "usage":
                return stream.ended(event.value)
        return b""

    # Not streaming

    async def _whole(self, feed: Feed) -> web.StreamResponse:
        completion = ChatCompletion(self._submitted.job_id)
        await self._gather(feed, completion, self._loop.time() + STATUS_HOLD_S)
        if completion.failure is not None:
            raise completion.failure
        if completion.is_over:
            return web.Response(body=completion.body, content_type="application/json", headers=self._headers)
        body = await self._begin("application/json", "no-store")
        try:
            while not completion.is_over:
                await body.write(b"\n")
                await self._gather(feed, completion, self._loop.time() + self._settings.keep_alive_s)
            if completion.failure is not None:
                raise completion.failure
        except (FeedError, ApiError) as error:
            # The status 200 is sent, and both SDKs take an error body under it for an answer.
            body.cut()
            log.info("gateway.chat_cut", job_id=self._submitted.job_id, code=_as_api_error(error).code)
            if feed.is_over:
                return body.response
            raise Abandoned(body.response) from None
        await body.write(completion.body)
        await body.end()
        return body.response

    async def _gather(self, feed: Feed, completion: ChatCompletion, ends_at: float) -> None:
        """Read until the job's end, at most until `ends_at`."""
        while not completion.is_over:
            event = feed.take() or await self._next(feed, ends_at)
            if event is None:
                return
            self._delivered += 1
            match event.kind:
                case "delta":
                    completion.delta(event.value)
                case "started":
                    completion.started(event.value)
                case "usage":
                    completion.ended(event.value)

    # Both

    async def _begin(self, content_type: str, cache_control: str) -> BodyWriter:
        headers = {
            "Content-Type": content_type,
            "Cache-Control": cache_control,
            "X-Accel-Buffering": "no",
        }
        response = web.StreamResponse(headers=headers | self._headers)
        await response.prepare(self._request)
        return BodyWriter(self._request, response, self._settings.stall_s)

    async def _next(self, feed: Feed, ends_at: float) -> FeedEvent | None:
        """Wait for the next event; None at `ends_at`. Raises FeedError; ApiError at the deadline."""
        try:
            async with asyncio.timeout_at(min(ends_at, self._gives_up_at)):
                return await feed.next()
        except TimeoutError:
            if self._loop.time() < self._gives_up_at:
                return None
        raise ApiError(
            504,
            "deadline",
            f"the job did not end by its deadline of {self._chat.timeout_s:g} s: is there a worker?",
            retriable=False,
        )


def _as_api_error(error: FeedError | ApiError | msgspec.MsgspecError) -> ApiError:
    match error:
        case ApiError():
            return error
        case FeedError():
            return api_error(error)
    return ApiError(500, "internal", "the gateway cannot read an event of the job")
