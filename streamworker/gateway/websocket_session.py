"""One websocket: its caller, its subscriptions, and its end."""

from __future__ import annotations

import asyncio
from contextlib import closing, suppress
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import structlog

from streamworker.gateway import websocket_frames as frames
from streamworker.gateway.client_stream import lifetime_s
from streamworker.gateway.cursors import Cursor
from streamworker.gateway.errors import ApiError
from streamworker.gateway.feed_errors import api_error, timestamp
from streamworker.gateway.feeds import FeedError, Replay
from streamworker.gateway.frames import retry_ms
from streamworker.gateway.jobs import check_job_id, check_record_key
from streamworker.gateway.outbound import Outbound
from streamworker.gateway.requests import since_ms
from streamworker.gateway.shared_limit import SharedLimit
from streamworker.gateway.socket_connection import SocketClosed, SocketFailed
from streamworker.gateway.websocket_subscription import FACE, LOOK_S, Subscription
from streamworker.gateway.websocket_work import Work
from streamworker.redaction import without_message
from streamworker.telemetry import gateway_metrics as table

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Mapping

    from streamworker.gateway.auth import Caller
    from streamworker.gateway.feeds import Feed
    from streamworker.gateway.gateway import Gateway
    from streamworker.gateway.socket_connection import SocketConnection

__all__ = ["MAX_SUBSCRIPTIONS", "Session"]

MAX_SUBSCRIPTIONS = 256
MAX_UNANSWERED = 256
"""Submits and cancels that Kafka has not acknowledged yet."""

AUTH_S = 5.0
"""How long a connection may be open without a credential."""

_EARLY_S = 0.005
"""By how much a timer may be early."""

_CLOSE_S = 2.0
_FACE = FACE
_REFUSED = "refused"
_DISCONNECTED = "disconnected"

GOING_AWAY, INTERNAL, TRY_AGAIN, TOO_LARGE = 1012, 1011, 1013, 1009
BAD_MESSAGE, NOT_AUTHENTICATED, FORBIDDEN, NO_AUTH, TOO_MANY = 4400, 4401, 4403, 4408, 4429

_CODES = {
    "age": GOING_AWAY,
    "shutdown": GOING_AWAY,
    "overload": TRY_AGAIN,
    "stalled": TRY_AGAIN,
    "token_expired": NOT_AUTHENTICATED,
    "error": INTERNAL,
}

log = structlog.get_logger()


class _Closed(Exception):
    """The websocket is to be closed with a code."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Session:
    """Serves one websocket. `caller` is None until the first message names it."""

    __slots__ = (
        "_caller",
        "_closes_at",
        "_counted",
        "_gateway",
        "_is_open",
        "_limit",
        "_loop",
        "_mailboxes",
        "_out",
        "_reason",
        "_settings",
        "_socket",
        "_subscriptions",
        "_timer",
        "_work",
    )

    def __init__(
        self,
        gateway: Gateway,
        socket: SocketConnection,
        caller: Caller | None = None,
    ) -> None:
        """`run` gives the stream of the caller back that `Limits.enter` has counted."""
        self._gateway = gateway
        self._settings = gateway.settings.gateway
        self._socket = socket
        self._caller = self._counted = caller
        self._loop = asyncio.get_running_loop()
        self._out = Outbound(
            socket,
            self._settings.stall_s,
            hold=self._hold,
            stalled=partial(self.close, "stalled"),
        )
        self._work: dict[str, Work] = {}
        self._subscriptions = 0
        """How much of the work are or become subscriptions."""
        self._mailboxes = SharedLimit()
        self._limit = asyncio.timeout(None)
        self._is_open = True
        self._reason: str | None = None
        self._closes_at = self._loop.time() + lifetime_s(self._settings.max_stream_age_s)
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> int:
        """Serve until the end of the connection. Return the status for the access log."""
        reason = _DISCONNECTED
        registration = self._gateway.drain.register(partial(self.close, "shutdown"))
        try:
            reason = await self._serve()
        except ConnectionError:
            pass
        finally:
            self._is_open = False
            self._out.stop()
            self._stop_timer()
            try:
                await self._end_work()
            finally:
                self._gateway.drain.unregister(registration)
                self._gateway.metrics.add(table.STREAMS_CLOSED, 1, _FACE, self._reason or reason)
                if self._counted is not None:
                    self._gateway.limits.leave(self._counted, _FACE)
        return 101

    async def _serve(self) -> str:
        """Serve, and close the websocket; return the reason."""
        try:
            async with self._limit:
                if self._caller is None:
                    await self._await_auth()
                else:
                    self._welcome(self._caller)
                await self._read()
        except TimeoutError:
            if self._reason is None:
                raise
            await self._end_work()
            await self._close_with(self._reason)
            return self._reason
        except _Closed as closed:
            self._reason = _REFUSED  # from now on `close` does nothing
            await self._end_work()
            await self._close(closed.code, closed.message)
            return _REFUSED
        except SocketClosed as closed:
            self._reason = _DISCONNECTED
            await self._end_work()
            self._socket.answer_close(closed.code)
        return _DISCONNECTED

    def close(self, reason: str) -> None:
        """End the connection with a `closing` message."""
        if self._is_open and self._reason is None:
            self._reason = reason
            self._limit.reschedule(self._loop.time())

    # The caller

    async def _await_auth(self) -> None:
        deadline = monotonic() + AUTH_S
        while self._caller is None:
            try:
                async with asyncio.timeout(max(0.0, deadline - monotonic())):
                    message = await self._receive()
            except TimeoutError:
                if self._reason is not None:
                    raise
                raise _Closed(NO_AUTH, f"no auth message within {AUTH_S:g} s") from None
            if isinstance(message, frames.Ping):
                self._send({"type": "pong"})
            elif isinstance(message, frames.Auth):
                self._authenticate(message)
            else:
                raise _Closed(NOT_AUTHENTICATED, "the first message must be auth")

    def _authenticate(self, message: frames.Auth) -> None:
        try:
            caller = self._gateway.authenticator.identify(message.token)
        except ApiError as error:
            self._send_error(error)
            raise _Closed(NOT_AUTHENTICATED, error.message) from None
        if self._caller is None:
            try:
                self._gateway.limits.admit(caller)
                self._gateway.limits.enter(caller, _FACE)
                self._counted = caller
            except ApiError as error:
                self._send_error(error)
                raise _Closed(TOO_MANY, error.message) from None
        elif not all(caller.allows(feed.job_id) for feed in self._open_feeds()):
            raise _Closed(FORBIDDEN, "the new credential does not allow a job that is subscribed to")
        self._caller = caller
        self._welcome(caller)

    def _welcome(self, caller: Caller) -> None:
        self._stop_timer()
        self._look()
        expires_at = caller.expires_at
        self._send(
            {
                "type": "welcome",
                "expires_at": None if expires_at is None else timestamp(round(expires_at * 1000)),
                "limits": {
                    "subscriptions": MAX_SUBSCRIPTIONS,
                    "message_bytes": frames.MAX_FRAME_BYTES,
                    "submit_bytes": self._gateway.settings.worker.max_job_bytes,
                },
            }
        )

    def _look(self) -> None:
        """Close the websocket if its time is over, its token has expired or its key was removed; else look again later."""
        caller = self._caller
        assert caller is not None
        left_s = self._closes_at - self._loop.time()
        if not self._gateway.authenticator.is_valid(caller):
            self.close("token_expired")
        elif left_s <= _EARLY_S:
            self.close("age")
        else:
            wait_s = min(left_s, self._settings.keep_alive_s, LOOK_S)
            if (expires_at := caller.expires_at) is not None:
                wait_s = min(wait_s, max(0.0, expires_at - self._gateway.clock.now_ms() / 1000))
            self._timer = self._loop.call_later(wait_s, self._look)
            for work in self._work.values():
                if work.subscription is not None:
                    work.subscription.look()

    # Messages of the client

    async def _receive(self) -> frames.Message | None:
        """Return the next message when the client has taken the answers. Raises _Closed, ConnectionResetError."""
        if self._out.is_full:
            await self._out.drained()
        try:
            data = await self._socket.receive()
        except SocketFailed as error:
            raise _Closed(error.code, str(error)) from None
        if isinstance(data, bytes):
            raise _Closed(BAD_MESSAGE, "messages must be text")
        try:
            return frames.read(
                data.encode(errors="surrogatepass"), self._gateway.settings.worker.max_job_bytes
            )
        except frames.BadFrame as error:
            self._send_error(ApiError(400, "invalid_request", str(error)))
            raise _Closed(BAD_MESSAGE, str(error)) from None
        except OverflowError:
            raise _Closed(TOO_LARGE, f"messages may have {frames.MAX_FRAME_BYTES} bytes") from None

    async def _read(self) -> None:
        while True:
            message = await self._receive()
            match message:
                case frames.Ping():
                    self._send({"type": "pong"})
                case frames.Auth():
                    self._authenticate(message)
                case frames.Subscribe():
                    work = partial(self._subscribe, message)
                    if (begun := self._begin(message.id, work, "read")) is not None:
                        begun.open(message.cursor)
                case frames.Unsubscribe():
                    self._unsubscribe(message.id)
                case frames.Submit():
                    work = partial(self._submit, message)
                    self._begin(message.id, work, "submit", subscribes=message.subscribe)
                case frames.Cancel():
                    work = partial(self._cancel, message)
                    self._begin(message.id, work, "cancel", subscribes=False)

    def _begin(
        self, id_: str, work: Callable[[], Coroutine[Any, Any, None]], scope: str, *, subscribes: bool = True
    ) -> Work | None:
        """Carry out a message in a task of its own; None if it may not be. Raises _Closed for an id that is in use."""
        caller = self._caller
        assert caller is not None
        if id_ in self._work:
            raise _Closed(BAD_MESSAGE, "the id is in use on this connection")
        try:
            self._check_room(subscribes=subscribes)
            self._gateway.authenticator.check_scope(caller, scope)
            self._gateway.limits.admit(caller)
        except ApiError as error:
            self._send_error(error, id_)
            return None
        task = self._loop.create_task(self._guarded(id_, work))
        self._work[id_] = begun = Work(task, subscribes=subscribes)
        self._subscriptions += subscribes
        task.add_done_callback(partial(self._is_done, id_))
        return begun

    def _check_room(self, *, subscribes: bool) -> None:
        """Raise ApiError if there are too many subscriptions, or other messages that are not answered yet.

        They are counted apart: a client with as many subscriptions as it may have can cancel jobs.
        """
        if subscribes and self._subscriptions >= MAX_SUBSCRIPTIONS:
            raise ApiError(429, "too_many_streams", f"a websocket may have {MAX_SUBSCRIPTIONS} subscriptions")
        if not subscribes and len(self._work) - self._subscriptions >= MAX_UNANSWERED:
            raise ApiError(
                429,
                "too_many_requests",
                f"a websocket may have {MAX_UNANSWERED} submits and cancels in flight",
            )

    def _is_done(self, id_: str, _: asyncio.Task[None]) -> None:
        """Forget a task. It may have been cancelled before it opened its feed, or before it began."""
        work = self._work.pop(id_)
        self._subscriptions -= work.subscribes
        if work.is_unsubscribed:
            self._send_end(id_, "unsubscribed", work.cursor)

    async def _guarded(self, id_: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Report the errors of a task to the client."""
        try:
            await work()
        except ApiError as error:
            self._send_error(error, id_)
        except FeedError as error:
            self._send_error(api_error(error), id_)
        except ConnectionError:
            pass
        except Exception as error:
            log.error(  # noqa: TRY400 - without the exception's message
                "gateway.request_failed", route="/v1/ws", exc_info=without_message(error)
            )
            self._send_error(ApiError(500, "internal", "the gateway failed to handle the message"), id_)

    def _unsubscribe(self, id_: str) -> None:
        work = self._work.get(id_)
        if work is None or not work.is_subscription:
            self._send_error(ApiError(400, "invalid_request", "no subscription has this id"), id_)
            return
        work.is_unsubscribed = True
        work.task.cancel()

    # What the messages ask for

    async def _subscribe(self, message: frames.Subscribe) -> None:
        caller = self._caller
        assert caller is not None
        check_job_id(message.job_id, caller)
        since = since_ms(message.since)
        if message.cursor and Cursor.parse(message.cursor).is_end:
            self._send(
                {"type": "subscribed", "id": message.id, "job_id": message.job_id}
                | {"resumed_from": message.cursor}
            )
            self._send({"type": "end", "id": message.id, "reason": "ended", "cursor": message.cursor})
            return
        await self._follow(
            message.id,
            message.job_id,
            cursor=message.cursor or None,
            since=since,
            replay=Replay(message.replay),
        )

    async def _submit(self, message: frames.Submit) -> None:
        caller = self._caller
        assert caller is not None
        if message.subscribe:
            self._gateway.authenticator.check_scope(caller, "read")
        key = check_record_key(message.key)
        self._gateway.require_broker()
        submitted = await self._gateway.jobs.submit(message.job, key=key, tenant=caller.tenant, face=_FACE)
        job_id, cursor, _ = submitted
        self._send({"type": "submitted", "id": message.id, "job_id": job_id, "cursor": cursor})
        if message.subscribe:
            await self._follow(message.id, job_id, cursor=cursor)

    async def _cancel(self, message: frames.Cancel) -> None:
        caller = self._caller
        assert caller is not None
        job_id = check_job_id(message.job_id, caller)
        self._gateway.require_broker()
        await self._gateway.jobs.cancel(job_id, message.reason, face=_FACE)
        self._send({"type": "cancelling", "id": message.id})

    async def _follow(
        self,
        id_: str,
        job_id: str,
        *,
        cursor: str | None,
        since: int | None = None,
        replay: Replay = Replay.EVENTS,
    ) -> None:
        self._gateway.require_broker()
        work = self._work[id_]
        work.open(cursor)
        feed = await self._gateway.event_log.open(job_id, cursor=cursor, since_ms=since, replay=replay)
        reason = "error"
        with closing(feed):
            if self._caller is not None:
                check_job_id(job_id, self._caller)  # it may have been renewed meanwhile
            subscription = Subscription(id_, feed, self._out, self._gateway.limits.delivered[FACE])
            work.follow(feed, subscription)
            self._send({"type": "subscribed", "id": id_, "job_id": job_id, "resumed_from": feed.resumed_from})
            self._mailboxes.add(feed)
            try:
                reason = await subscription.run()
            except asyncio.CancelledError:
                if not work.is_unsubscribed:
                    raise
                reason = "unsubscribed"
            finally:
                work.end()
                self._mailboxes.remove(feed)
                self._gateway.metrics.add(table.STREAMS_CLOSED, 1, "subscription", reason)
                self._send_end(id_, reason, feed.cursor)

    # The end

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def _end_work(self) -> None:
        tasks = [work.task for work in self._work.values()]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _close_with(self, reason: str) -> None:
        if reason == "stalled":
            self._out.abort()  # a close frame would wait behind what the client does not take
            return
        self._send({"type": "closing", "reason": reason, "reconnect_after_ms": retry_ms()})
        await self._close(_CODES[reason], reason)

    async def _close(self, code: int, message: str) -> None:
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                await self._socket.close(code, message.encode()[:120])

    # What the gateway sends

    def _hold(self) -> None:
        """Push no more deltas: the client does not take them."""
        for feed in self._open_feeds():
            feed.hold()

    def _open_feeds(self) -> Iterator[Feed]:
        return (work.feed for work in self._work.values() if work.feed is not None)

    def _send(self, value: Mapping[str, Any]) -> None:
        self._out.write(frames.text_frame(value))

    def _send_end(self, id_: str, reason: str, cursor: str | None) -> None:
        if self._is_open and self._reason in {None, _REFUSED}:
            self._send({"type": "end", "id": id_, "reason": reason, "cursor": cursor})

    def _send_error(self, error: ApiError, id_: str | None = None) -> None:
        self._gateway.metrics.add(table.ERRORS, 1, error.code)
        value: dict[str, Any] = {"type": "error"}
        if id_ is not None:
            value["id"] = id_
        self._send(value | {"error": error.value()})
