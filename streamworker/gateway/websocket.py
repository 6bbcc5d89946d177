"""`GET /v1/ws`: many jobs over one websocket."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, cast

from aiohttp import hdrs, web

from streamworker.gateway.auth import CALLER
from streamworker.gateway.cors import Cors
from streamworker.gateway.errors import ApiError
from streamworker.gateway.socket_connection import SocketConnection, accept_of
from streamworker.gateway.stream_connection import StreamedResponse
from streamworker.gateway.websocket_session import Session
from streamworker.gateway.websocket_subscription import FACE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.gateway.auth import Caller
    from streamworker.gateway.gateway import Gateway
    from streamworker.gateway.server import Connection

__all__ = ["PROTOCOL", "routes"]

PROTOCOL = "streamworker.v1"

_BEARER = "bearer."
_VERSION = "13"


def routes(gateway: Gateway) -> list[web.RouteDef]:
    """Return the routes of this module."""
    return [web.get("/v1/ws", _Handlers(gateway).connect, allow_head=False)]


class _Handlers:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        settings = gateway.settings.gateway
        self._cors = Cors(settings.cors_origins, has_auth=settings.auth != "off")

    async def connect(self, request: web.Request) -> web.StreamResponse:
        gateway = self._gateway
        if request.headers.get(hdrs.UPGRADE, "").lower() != "websocket":
            raise ApiError(
                426, "upgrade_required", "this path is a websocket", headers={"Upgrade": "websocket"}
            )
        if request.headers.get(hdrs.SEC_WEBSOCKET_VERSION) != _VERSION:
            raise ApiError(  # RFC 6455 section 4.4
                426,
                "upgrade_required",
                f"the version of the websocket protocol must be {_VERSION}",
                headers={"Upgrade": "websocket", "Sec-WebSocket-Version": _VERSION},
            )
        self._check_origin(request)
        offered = ",".join(request.headers.getall(hdrs.SEC_WEBSOCKET_PROTOCOL, ()))
        protocols = [name.strip() for name in offered.split(",")]
        if PROTOCOL not in protocols:
            raise ApiError(400, "invalid_request", f"the subprotocol {PROTOCOL} is required")
        caller = self._caller(request, protocols)
        gateway.require_broker()
        if (accept := accept_of(request)) is None:
            raise ApiError(400, "invalid_request", "the request is not a valid websocket handshake")
        with ExitStack() as stack:
            if caller is not None:
                gateway.limits.enter(caller, FACE)
                stack.callback(gateway.limits.leave, caller, FACE)
            response = await self._upgraded(request, accept)
            session = Session(gateway, response.connection, caller)
            response.connection.run(session.run(), keep_alive=False)
            stack.pop_all()  # the session does it at its end
        return response

    async def _upgraded(self, request: web.Request, accept: str) -> StreamedResponse[SocketConnection]:
        """Switch protocols."""
        headers = {
            hdrs.UPGRADE: "websocket",
            hdrs.CONNECTION: "upgrade",
            hdrs.SEC_WEBSOCKET_ACCEPT: accept,
            hdrs.SEC_WEBSOCKET_PROTOCOL: PROTOCOL,
        }
        response = StreamedResponse[SocketConnection](status=101, headers=headers)
        await response.prepare(request)
        max_bytes = self._gateway.settings.worker.max_job_bytes
        response.connection = cast("Connection", request.protocol).pass_on(
            partial(SocketConnection, max_message_bytes=max_bytes)
        )
        return response

    def _caller(self, request: web.Request, protocols: Sequence[str]) -> Caller | None:
        """Return the caller; None if the first message is to name it."""
        bearer = next((name for name in protocols if name.startswith(_BEARER)), None)
        if bearer is not None:
            caller = self._gateway.authenticator.identify(bearer.removeprefix(_BEARER))
            request[CALLER] = caller
            self._gateway.limits.admit(caller)
        elif self._gateway.authenticator.has_credential(request):
            caller = self._gateway.authenticator.caller(request)
        else:
            return None
        return caller

    def _check_origin(self, request: web.Request) -> None:
        """Refuse pages of other origins: browsers open websockets across origins without asking."""
        if not self._cors.may_act(request):
            raise ApiError(
                403,
                "origin_not_allowed",
                "pages of this origin may not connect: add it to gateway.cors_origins",
            )
