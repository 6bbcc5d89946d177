"""The HTTP/1.1 server: a listening socket, and connections that bound what a client can hold."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

import structlog
from aiohttp import web

from streamworker.errors import ConfigurationError
from streamworker.gateway.errors import ApiError
from streamworker.gateway.expectations import hide_expectations
from streamworker.gateway.limits import MAX_CONNECTIONS
from streamworker.gateway.stream_connection import StreamConnection
from streamworker.log_throttle import LogThrottle
from streamworker.redaction import without_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from streamworker.gateway.stream_connection import ConnectionOwner

__all__ = ["Server"]

SERVER = "streamworker"
"""The `Server` header. aiohttp's names its version."""

SEND_BUFFER_BYTES = 128 << 10
"""Socket buffer of a connection. With the system's default, megabytes wait there for a client that does not read."""

REQUEST_TIMEOUT_S = 20.0
"""How long a new connection may take to send the headers of its first request."""

STALL_S = 30.0
"""How long a client may take nothing of a response."""

_GRACE_S = 5.0
"""Added to the time after which a stalled client is cut: a handler that watches its client ends its response first."""

_KEEP_ALIVE_S = 75.0
_BACKLOG = 2048
_MAX_LINE_BYTES = 32_768
"""Of the request line and of a header: a read token that names 64 jobs has 18 KB."""

T = TypeVar("T", bound=StreamConnection)

log = structlog.get_logger()

_silent = logging.getLogger("streamworker.gateway.aiohttp")
_silent.addHandler(logging.NullHandler())
_silent.propagate = False  # its records quote requests; `Connection` logs what is worth a line


class Connection(web.RequestHandler):
    """One connection. It is closed if its first request does not arrive in time, or its client takes no response."""

    __slots__ = (
        "_guard",
        "_has_request",
        "_is_at_end",
        "_stall",
        "_stall_s",
        "_streams",
        "_throttle",
        "_unsent",
    )

    def __init__(
        self,
        manager: web.Server,
        throttle: LogThrottle,
        streams: _Streams,
        stall_s: float,
        **options: Any,
    ) -> None:
        super().__init__(manager, **options)
        self._stall_s = stall_s
        self._stall: asyncio.TimerHandle | None = None
        self._unsent = 0
        """Bytes that waited for the client when it was last looked at."""
        self._throttle = throttle
        self._streams = streams
        self._has_request = False
        self._is_at_end = False
        self._guard: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, and start the timer for the first request."""
        super().connection_made(transport)
        self._guard = asyncio.get_running_loop().call_later(REQUEST_TIMEOUT_S, self._close_if_silent)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End, and stop the timer."""
        if self._guard is not None:
            self._guard.cancel()
        self._watch_no_longer()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Watch whether the client takes the response."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """Watch the client no longer: it has taken enough."""
        super().resume_writing()
        self._watch_no_longer()

    def request_arrived(self) -> None:
        """Stop the timer: the headers of a request have been read."""
        self._has_request = True
        if self._guard is not None:
            self._guard.cancel()
            self._guard = None

    def data_received(self, data: bytes) -> None:
        """Parse requests."""
        if data:
            self._is_at_end = data.endswith(b"\r\n\r\n")
        super().data_received(data)

    @property
    def has_more(self) -> bool:
        """Whether anything may have been received behind the head of the present request."""
        return not self._is_at_end or bool(self._messages or self._message_tail)

    def pass_on(self, make: Callable[[asyncio.Transport, ConnectionOwner], T]) -> T:
        """Give the connection to a stream, which `make` makes. The handler returns a `StreamedResponse`.

        If `has_more` is true, the connection must not serve requests behind the stream.

        Raises ConnectionResetError: the client is gone.
        """
        transport = self.transport
        if transport is None or self._manager is None:
            raise ConnectionResetError("the client is gone")
        stream = make(transport, self._streams)
        self._streams.add(stream)
        self._manager.connection_lost(self)  # it forgets this connection when its task has ended
        # What `RequestHandler.connection_lost` does, but for the transport and the running handler.
        self.transport = None
        self._force_close = True
        self._parser = None
        self._messages.clear()
        received, self._message_tail = self._message_tail, b""
        if self._buffer_paused:
            transport.resume_reading()
        if received:
            stream.data_received(received)
        if self.writing_paused:  # an answer before it waits in the transport
            stream.pause_writing()
        if self._keepalive_handle is not None:
            self._keepalive_handle.cancel()
            self._keepalive_handle = None
        self._watch_no_longer()  # the stream does
        return stream

    def _watch(self) -> None:
        if self.transport is not None:
            self._unsent = self.transport.get_write_buffer_size()
            self._stall = asyncio.get_running_loop().call_later(self._stall_s, self._cut_if_stalled)

    def _watch_no_longer(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _cut_if_stalled(self) -> None:
        if self.transport is None:
            return
        if self.transport.get_write_buffer_size() < self._unsent:
            self._watch()
        else:
            self.transport.abort()

    def _close_if_silent(self) -> None:
        if not self._has_request:
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - the overridden method's
    ) -> web.StreamResponse:
        """Answer what is not valid HTTP. Neither the log nor the answer repeats it."""
        if request.writer.output_size > 0:
            raise ConnectionError("a response was begun")
        if status < 500 and exc is not None:
            error = ApiError(400, "invalid_request", "the request is not valid HTTP/1.1", retriable=False)
        else:
            self.log_exception("request failed", exc_info=exc)
            error = ApiError(500, "internal", "the gateway failed to handle the request")
        response = web.Response(
            status=error.status,
            body=error.body(),
            content_type="application/json",
            headers={
                "Cache-Control": "no-store",
                "Referrer-Policy": "no-referrer",
                "Server": SERVER,
                "X-Content-Type-Options": "nosniff",
                "x-should-retry": "false",  # it may have been a POST
            },
        )
        response.force_close()
        return response

    def log_exception(self, *_args: Any, **fields: Any) -> None:
        """Log an exception of the server without its message, which may quote the request."""
        if (repetition := self._throttle.failed(monotonic())) is not None:
            error = fields.get("exc_info")
            shown = without_message(error) if isinstance(error, BaseException) else None
            log.error("gateway.connection_failed", exc_info=shown, **repetition)


class Server:
    """Serves an application on `host` and `port`. Port 0 selects a free port; `port` is it after `start`.

    A client that takes nothing of a response for `stall_s` is disconnected a little later.
    """

    def __init__(self, app: web.Application, host: str, port: int, *, stall_s: float = STALL_S) -> None:
        self.host = host
        self.port = port
        self._runner = web.AppRunner(
            app, access_log=None, handle_signals=False, handler_cancellation=True, shutdown_timeout=1.0
        )
        self._stall_s = stall_s + _GRACE_S
        self._listener: asyncio.Server | None = None
        self._throttle = LogThrottle()
        self._streams = _Streams(self._connect)

    @property
    def connections(self) -> int:
        """Open connections."""
        requests = len(self._runner.server.connections) if self._runner.server is not None else 0
        return requests + len(self._streams)

    @property
    def is_full(self) -> bool:
        """Whether there are more connections than the process may have."""
        return self.connections > MAX_CONNECTIONS

    async def start(self) -> None:
        """Start listening. Raises ConfigurationError if the address is in use or cannot be bound."""
        await self._runner.setup()
        if (manager := self._runner.server) is not None:
            manager.request_factory = hide_expectations(manager.request_factory)
        loop = asyncio.get_running_loop()
        try:
            listening = await loop.run_in_executor(None, _listening_socket, self.host, self.port)
        except OSError as error:
            await self._runner.cleanup()
            raise ConfigurationError([self._fault(error)]) from error
        self._listener = await loop.create_server(self._connect, sock=listening, backlog=_BACKLOG)
        self.port = listening.getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and close all connections. May be called twice, and before `start`."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()
        await self._runner.cleanup()
        await self._streams.stop()

    def _connect(self) -> Connection:
        manager = self._runner.server
        if manager is None:
            raise ConnectionResetError("the server has stopped")
        return Connection(
            manager,
            self._throttle,
            self._streams,
            self._stall_s,
            loop=asyncio.get_running_loop(),
            access_log=None,
            logger=_silent,
            keepalive_timeout=_KEEP_ALIVE_S,
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_LINE_BYTES,
            auto_decompress=False,
        )

    def _fault(self, error: OSError) -> str:
        place = f"{self.host}:{self.port}"
        if error.errno == errno.EADDRINUSE:
            return f"gateway.port: {place} is in use; choose another port, or 0 for a free one"
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        return f"gateway.port: cannot listen on {place}: {reason}; choose another host or port"


class _Streams:
    """The connections that carry streams."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._open: set[StreamConnection] = set()
        self._is_stopped = False

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[StreamConnection]:
        return iter(list(self._open))

    def add(self, connection: StreamConnection) -> None:
        """Note a connection that was made."""
        self._open.add(connection)

    def forget(self, connection: StreamConnection) -> None:
        """Note that a connection is closed."""
        self._open.discard(connection)

    def adopt(self, connection: StreamConnection, received: bytes, *, is_paused: bool) -> None:
        """Serve further requests on a connection."""
        self.forget(connection)
        if self._is_stopped:
            connection.transport.close()
            return
        following = self._connect()
        connection.transport.set_protocol(following)
        following.connection_made(connection.transport)
        if is_paused:
            following.pause_writing()
        following.request_arrived()  # one was here before: the connection may be idle for as long as any other
        if received:
            following.data_received(received)

    async def stop(self) -> None:
        """End all streams, and close their connections."""
        self._is_stopped = True
        tasks = [one.task for one in self._open if one.task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        for one in self:
            one.transport.abort()


def _listening_socket(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES
        )  # accepted sockets inherit it
        if family == socket.AF_INET6:
            listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind(address)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        raise
    return listening
