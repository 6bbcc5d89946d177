"""`GET /v1/jobs/{job_id}/events`: the events of one job as server-sent events, lines of JSON, or one JSON object."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any, cast

import orjson
from aiohttp import HttpVersion11, web

from streamworker.gateway import frames, negotiation
from streamworker.gateway.client_stream import ClientStream
from streamworker.gateway.cursors import Cursor
from streamworker.gateway.errors import ApiError
from streamworker.gateway.feeds import Replay
from streamworker.gateway.gateway import JOB_ID
from streamworker.gateway.jobs import check_job_id
from streamworker.gateway.requests import check_query, since_ms
from streamworker.gateway.stream_connection import StreamConnection, StreamedResponse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.gateway.auth import Caller
    from streamworker.gateway.feeds import Feed
    from streamworker.gateway.gateway import Gateway
    from streamworker.gateway.server import Connection

__all__ = ["EVENTS_PATH", "closing_response", "routes"]

EVENTS_PATH = "/v1/jobs/{job_id}/events"

MAX_EVENTS = 10_000
MAX_BYTES = 8 << 20
"""Limits of a JSON answer; its cursor continues it."""

_POLL_S = 0.05
_FRAMINGS = {negotiation.SSE: frames.SSE, negotiation.NDJSON: frames.NDJSON}
_NOT_BUFFERED = {"Cache-Control": "no-store, no-transform", "X-Accel-Buffering": "no"}
_REASONS = {"draining": "shutdown", "overloaded": "overload", "too_many_requests": "overload"} | {
    "too_many_streams": "overload"
}


def routes(gateway: Gateway) -> list[web.RouteDef]:
    """Return the routes of this module."""
    return [web.get(EVENTS_PATH, _Handlers(gateway).stream, allow_head=False)]


def closing_response(error: ApiError) -> web.Response:
    """Return temporary trouble as an event stream with one `closing`: EventSource takes any other status as final."""
    reason = _REASONS.get(error.code, "error")
    value = {"type": "closing", "reason": reason, "retriable": True}
    return web.Response(
        body=frames.SSE.own("closing", value), content_type=negotiation.SSE, headers=_NOT_BUFFERED
    )


class _Handlers:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def stream(self, request: web.Request) -> web.StreamResponse:
        gateway = self._gateway
        caller = gateway.authenticator.require(request, "read")
        job_id = check_job_id(request.match_info["job_id"], caller)
        request[JOB_ID] = job_id
        format_ = negotiation.requested_format(request)
        query = check_query(request, ("cursor", "last_event_id", "since", "replay"))
        replay, since = _replay(query), since_ms(query.get("since"))
        cursor = request.headers.get("Last-Event-ID") or query.get("cursor") or query.get("last_event_id")
        if cursor and Cursor.parse(cursor).is_end:
            return web.Response(status=204)
        face = _FRAMINGS[format_].face if format_ in _FRAMINGS else "json"
        with ExitStack() as stack:
            gateway.limits.enter(caller, face)
            stack.callback(gateway.limits.leave, caller, face)
            gateway.require_broker()
            feed = await gateway.event_log.open(job_id, cursor=cursor or None, since_ms=since, replay=replay)
            stack.callback(feed.close)
            if format_ == negotiation.JSON:
                return await self._at_once(feed)
            response = await self._follow(request, feed, _FRAMINGS[format_], caller)
            stack.pop_all()  # the stream does both at its end
            return response

    async def _follow(
        self, request: web.Request, feed: Feed, framing: frames.Framing, caller: Caller
    ) -> StreamedResponse[StreamConnection]:
        headers = {
            "Content-Type": framing.content_type,
            "Streamworker-Resumed-From": feed.resumed_from,
            **_NOT_BUFFERED,
        }
        response = StreamedResponse[StreamConnection](headers=headers)
        served = cast("Connection", request.protocol)
        if served.has_more or request.can_read_body:
            response.force_close()  # a body that is still to come would be read as the next request
        await response.prepare(request)
        response.connection = connection = served.pass_on(StreamConnection)
        is_chunked = request.version >= HttpVersion11
        stream = ClientStream(self._gateway, connection, feed, framing, caller, is_chunked=is_chunked)
        connection.run(stream.run(), keep_alive=bool(response.keep_alive))
        return response

    async def _at_once(self, feed: Feed) -> web.Response:
        """Return the events that are in the log now."""
        values: list[Any] = []
        size = 0
        deadline = asyncio.get_running_loop().time() + self._gateway.settings.gateway.search_max_s
        while len(values) < MAX_EVENTS and size < MAX_BYTES:
            if (event := feed.take()) is None:
                if feed.is_over or feed.is_live or asyncio.get_running_loop().time() > deadline:
                    break
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        event = await feed.next()
            if event is not None:
                values.append(orjson.Fragment(event.value))
                size += len(event.value)
        self._gateway.limits.delivered["json"].events += len(values)
        # A job without events is asked for again and again: what was searched for it is not searched again.
        value = {"events": values, "cursor": feed.place(), "ended": feed.is_over}
        headers = {"Streamworker-Resumed-From": feed.resumed_from}
        return web.Response(body=orjson.dumps(value), content_type=negotiation.JSON, headers=headers)


def _replay(query: Mapping[str, str]) -> Replay:
    try:
        return Replay(query.get("replay", Replay.EVENTS.value))
    except ValueError:
        raise ApiError(
            400, "invalid_request", "replay must be events, snapshot or none", param="replay"
        ) from None
