"""What happens around every request: errors, request id, CORS, security headers, limits, access log, metrics."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING
from uuid import uuid4

import structlog
from aiohttp import HttpVersion11, hdrs, web

from streamworker.gateway.auth import CALLER
from streamworker.gateway.cors import Cors
from streamworker.gateway.errors import ApiError
from streamworker.gateway.event_stream import EVENTS_PATH, closing_response
from streamworker.gateway.expectations import waits_to_be_asked
from streamworker.gateway.feed_errors import api_error
from streamworker.gateway.feeds import FeedError
from streamworker.gateway.gateway import JOB_ID, SPAN
from streamworker.gateway.negotiation import wants_event_stream
from streamworker.gateway.server import SERVER, Connection
from streamworker.gateway.stream_connection import StreamedResponse
from streamworker.redaction import without_message
from streamworker.telemetry import gateway_metrics as table
from streamworker.wire.job import TRACE_HEADERS, trace_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.typedefs import Handler

    from streamworker.gateway.gateway import Gateway
    from streamworker.model import Headers
    from streamworker.observe import RequestSpan
    from streamworker.telemetry.metrics import Metrics

__all__ = ["REQUEST_ID", "install"]

REQUEST_ID = web.RequestKey("request_id", str)
"""The client's X-Request-Id, or a new one."""

_ERROR = web.RequestKey("error", str)
"""The code of the error in the response."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}\Z")
_UNKNOWN = "unknown"
_SAFE = frozenset({hdrs.METH_GET, hdrs.METH_HEAD, hdrs.METH_OPTIONS})
_DISCONNECTED = 499
"""The status in the access log of a request whose client disconnected: its handler was cancelled."""

_SUBMITTING = frozenset({"/v1/jobs", "/v1/chat/completions"})
"""Routes whose POST submits a job, and has a span."""

_STREAMS = frozenset({"/v1/jobs/{job_id}/events", "/v1/ws", "/v1/chat/completions"})
"""Routes whose responses last as long as a job does: they have no place in a histogram of durations."""

_STATUSES = {
    404: ("not_found", "there is no such path; /openapi.json lists them"),
    405: ("method_not_allowed", "the path does not have this method"),
    413: ("too_large", "the body is too large"),
    415: ("unsupported_media_type", "the body must be application/json"),
    426: ("upgrade_required", "this path is a websocket"),
}
"""Code and message for the errors that aiohttp raises."""

log = structlog.get_logger()


def install(app: web.Application, gateway: Gateway, is_full: Callable[[], bool]) -> None:
    """Add the middleware to an application."""
    around = _Around(gateway, is_full)

    @web.middleware
    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await around.handle(request, handler)

    app.middlewares.append(handle)
    app.on_response_prepare.append(around.add_headers)


class _Around:
    def __init__(self, gateway: Gateway, is_full: Callable[[], bool]) -> None:
        self._gateway = gateway
        self._metrics: Metrics = gateway.metrics
        settings = gateway.settings.gateway
        self._has_auth = settings.auth != "off"
        self._cors = Cors(settings.cors_origins, has_auth=self._has_auth)
        self._is_full = is_full

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        headers = response.headers
        headers["X-Content-Type-Options"] = "nosniff"
        headers[hdrs.SERVER] = SERVER
        headers["Referrer-Policy"] = "no-referrer"
        headers["X-Request-Id"] = request.get(REQUEST_ID, "")
        headers.setdefault(hdrs.CACHE_CONTROL, "no-store")
        if request.version < HttpVersion11 and hdrs.CONTENT_LENGTH not in headers:
            response.force_close()  # the end of the connection is that of the body
        self._cors.add_headers(request, response)

    async def handle(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if isinstance(request.protocol, Connection):
            request.protocol.request_arrived()
        given = request.headers.get("X-Request-Id", "")
        request[REQUEST_ID] = given if _REQUEST_ID.match(given) else uuid4().hex
        began = monotonic()
        self._open_span(request)
        self._gateway.drain.enter()
        response: web.StreamResponse | None = None
        try:
            response = await self._answer(request, handler)
            if waits_to_be_asked(request):
                response.force_close()  # the client may send the body or the next request now
        finally:
            ended = partial(self._ended, _Asked.of(request), began)
            if isinstance(response, StreamedResponse):
                response.connection.on_end(ended)
            else:
                ended(_DISCONNECTED if response is None else response.status)
        return response

    def _open_span(self, request: web.Request) -> None:
        route = _route(request)
        if request.method == hdrs.METH_POST and route in _SUBMITTING:
            request[SPAN] = self._gateway.tracer.open_request(request.method, route, _trace(request))

    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if (preflight := self._cors.preflight(request)) is not None:
            return preflight
        try:
            self._admit()
            self._check_origin(request)
            return await handler(request)
        except ApiError as error:
            return self._rendered(request, error)
        except FeedError as error:
            return self._rendered(request, api_error(error))
        except web.HTTPException as error:
            if error.status < 400:
                raise
            return self._rendered(request, _of_aiohttp(error))
        except ConnectionError:
            raise
        except Exception as error:
            log.error(  # noqa: TRY400 - without the exception's message
                "gateway.request_failed",
                route=_route(request),
                request_id=request[REQUEST_ID],
                exc_info=without_message(error),
            )
            return self._rendered(
                request, ApiError(500, "internal", "the gateway failed to handle the request")
            )

    def _admit(self) -> None:
        if self._gateway.drain.is_draining:
            raise ApiError(503, "draining", "this gateway is shutting down: try again, at another one")
        if self._is_full():
            raise ApiError(503, "overloaded", "this gateway has as many connections as it may have")

    def _check_origin(self, request: web.Request) -> None:
        """Refuse actions of pages of other origins where no credential is asked for, which such a page would not have."""
        if self._has_auth or request.method in _SAFE or self._cors.may_act(request):
            return
        raise ApiError(
            403,
            "origin_not_allowed",
            "pages of this origin may not send requests: add it to gateway.cors_origins",
        )

    def _rendered(self, request: web.Request, error: ApiError) -> web.StreamResponse:
        self._metrics.add(table.ERRORS, 1, error.code)
        request[_ERROR] = error.code
        is_temporary = error.status in {429, 503} and error.retriable
        if is_temporary and _route(request) == EVENTS_PATH and wants_event_stream(request):
            return closing_response(error)
        response = render(request, error)
        if error.code in {"draining", "overloaded"}:
            response.force_close()
        return response

    def _ended(self, asked: _Asked, began: float, status: int) -> None:
        """Report a request, or a stream that outlived its handler."""
        self._gateway.drain.leave()
        seconds = monotonic() - began
        self._metrics.add(table.REQUESTS, 1, asked.route, asked.method, str(status))
        if asked.route not in _STREAMS:
            self._metrics.observe(table.REQUEST_DURATION, seconds, asked.route)
        if asked.span is not None:
            sent = None if status == _DISCONNECTED else status
            asked.span.ended(sent, job_id=asked.job_id, error=asked.error)
        log.info(
            "gateway.request",
            method=asked.method,
            route=asked.route,
            status=status,
            error_code=asked.error,
            ms=round(seconds * 1000, 1),
            key=asked.key,
            job_id=asked.job_id,
            request_id=asked.request_id,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Asked:
    """What is reported of a request. The request itself is freed before its stream ends."""

    method: str
    route: str
    key: str | None
    job_id: str | None
    request_id: str
    span: RequestSpan | None
    error: str | None

    @classmethod
    def of(cls, request: web.Request) -> _Asked:
        caller = request.get(CALLER)
        return cls(
            method=request.method if request.method in hdrs.METH_ALL else "other",
            route=_route(request),
            key=None if caller is None else caller.name,
            job_id=request.get(JOB_ID),
            request_id=request[REQUEST_ID],
            span=request.get(SPAN),
            error=request.get(_ERROR),
        )


def render(request: web.Request, error: ApiError) -> web.Response:
    """Return the response for an error."""
    headers = dict(error.headers)
    if request.method == hdrs.METH_POST:
        headers["x-should-retry"] = "true" if error.retriable else "false"
    return web.Response(
        status=error.status, body=error.body(), content_type="application/json", headers=headers
    )


def _of_aiohttp(error: web.HTTPException) -> ApiError:
    code, message = _STATUSES.get(error.status, ("invalid_request", "the request is not valid"))
    headers = {}
    if isinstance(error, web.HTTPMethodNotAllowed):
        headers["Allow"] = ", ".join(sorted(error.allowed_methods))
    return ApiError(error.status, code, message, headers=headers)


def _trace(request: web.Request) -> Headers:
    """Return the W3C trace context of a request. The worker carries it on to the upstream call and the events."""
    given = [(name, request.headers.get(name, "")) for name in TRACE_HEADERS]
    return trace_of(tuple((name, value.encode("ascii", "ignore")) for name, value in given if value))


def _route(request: web.Request) -> str:
    """Return the path's pattern: a path itself is text of the client."""
    resource = request.match_info.route.resource
    return _UNKNOWN if resource is None else resource.canonical
