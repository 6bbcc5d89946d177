"""`/v1/files` and `/v1/batches`, which need the topics of results and batches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from streamworker.gateway.errors import ApiError

if TYPE_CHECKING:
    from streamworker.gateway.gateway import Gateway

__all__ = ["routes"]


def routes(gateway: Gateway) -> list[web.RouteDef]:
    """Return the routes of this module."""

    async def refuse(request: web.Request) -> web.Response:
        gateway.authenticator.caller(request)
        raise ApiError(
            501,
            "not_configured",
            "files and batches need topics.results and topics.batches in the configuration",
        )

    return [
        web.route("*", f"/v1/{name}{rest}", refuse)
        for name in ("files", "batches")
        for rest in ("", "/{rest:.*}")
    ]
