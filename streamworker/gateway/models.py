"""`/v1/models`: the models that jobs can ask for by name."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from streamworker.gateway.errors import ApiError

if TYPE_CHECKING:
    from streamworker.config import Settings
    from streamworker.gateway.gateway import Gateway

__all__ = ["is_served", "model_names", "routes", "unknown_model"]

_WILDCARDS = frozenset("*?[")


def routes(gateway: Gateway) -> list[web.RouteDef]:
    """Return the routes of this module."""
    handlers = _Handlers(gateway)
    return [
        web.get("/v1/models", handlers.list, allow_head=False),
        web.get("/v1/models/{model:.+}", handlers.get, allow_head=False),
    ]


def model_names(settings: Settings) -> list[str]:
    """Return the names that the settings list, each once; patterns are left out."""
    names = [name for upstream in settings.upstreams.values() for name in upstream.models]
    names += settings.gateway.models
    return list(dict.fromkeys(name for name in names if _WILDCARDS.isdisjoint(name)))


def is_served(settings: Settings, model: str) -> bool:
    """Whether an upstream lists the model, by its name or by a pattern, or `gateway.models` does."""
    return model in settings.gateway.models or any(
        fnmatchcase(model, pattern) for upstream in settings.upstreams.values() for pattern in upstream.models
    )


def unknown_model(model: str) -> ApiError:
    """Return the error for a model that no upstream serves."""
    shown = model if len(model) <= 100 else f"{model[:100]}..."
    return ApiError(
        404,
        "model_not_found",
        f"no upstream serves the model {shown!r}; GET /v1/models lists names",
        param="model",
    )


class _Handlers:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._models = {name: _model(name) for name in model_names(gateway.settings)}

    async def list(self, request: web.Request) -> web.Response:
        self._gateway.authenticator.require(request, "read")
        return _json({"object": "list", "data": list(self._models.values())})

    async def get(self, request: web.Request) -> web.Response:
        self._gateway.authenticator.require(request, "read")
        name = request.match_info["model"]
        if name not in self._models:
            raise unknown_model(name)
        return _json(self._models[name])


def _model(name: str) -> dict[str, Any]:
    """Return OpenAI's object. All replicas have to give the same, so there is no time in it."""
    return {"id": name, "object": "model", "created": 0, "owned_by": "streamworker"}


def _json(value: Any) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")
