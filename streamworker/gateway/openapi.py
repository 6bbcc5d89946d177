"""`GET /openapi.json`: the description of this API, schemas/gateway.openapi.yaml as JSON."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from streamworker.gateway.gateway import Gateway

__all__ = ["FILE", "routes"]

FILE = "gateway.openapi.json"


def routes(_gateway: Gateway | None = None) -> list[web.RouteDef]:
    """Return the route of the document. It needs no identity."""
    document = _document()

    async def get(_request: web.Request) -> web.Response:
        return web.Response(body=document, content_type="application/json")

    return [web.get("/openapi.json", get, allow_head=False)]


def _document() -> bytes:
    folder: Traversable = files("streamworker") / "schemas"
    if not folder.is_dir():  # an editable installation: the wheel contains a copy of schemas/
        folder = Path(__file__).parent.parent.parent / "schemas"
    return (folder / FILE).read_bytes()
