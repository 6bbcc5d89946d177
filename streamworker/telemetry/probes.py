"""HTTP endpoints for probes and metrics: `/livez`, `/readyz`, `/metrics`.

A failed liveness probe restarts the process, so it depends on this process alone: the event loop answers, and the poll
loop has recently completed an iteration. A broker that is down makes the worker not ready, but keeps it alive.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web
from prometheus_client.exposition import choose_encoder

from streamworker.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

    from prometheus_client import CollectorRegistry

__all__ = ["Probes"]

_ADVICE = "choose another port, or 0 for a free one"


class Probes:
    """An HTTP server on `host` and `port`. Port 0 selects a free port; `port` is the selected one after `start`.

    `heartbeat_age` returns the seconds since the last iteration of the poll loop. `readiness` returns whether the
    worker is ready, and the detail for the body of `/readyz`. Both are called for each request and must not block.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        registry: CollectorRegistry,
        heartbeat_age: Callable[[], float],
        readiness: Callable[[], tuple[bool, dict[str, Any]]],
        max_heartbeat_age_s: float = 60.0,
    ) -> None:
        self.host = host
        self.port = port
        self._registry = registry
        self._heartbeat_age = heartbeat_age
        self._readiness = readiness
        self._max_heartbeat_age_s = max_heartbeat_age_s
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Start listening.

        Raises:
            ConfigurationError: the address is in use or cannot be bound.
        """
        runner = web.AppRunner(self._app(), access_log=None, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        try:
            await web.TCPSite(runner, self.host, self.port).start()
        except OSError as error:
            await runner.cleanup()
            raise ConfigurationError([self._fault(error)]) from error
        self._runner = runner
        self.port = runner.addresses[0][1]

    async def stop(self) -> None:
        """Stop listening and close all connections. May be called twice, and before `start`."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    def _app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/livez", self._live)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._metrics)
        return app

    def _fault(self, error: OSError) -> str:
        place = f"{self.host}:{self.port}"
        if error.errno == errno.EADDRINUSE:
            return f"telemetry.http_port: {place} is in use, perhaps by another worker or gateway on this machine; {_ADVICE}"
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        return f"telemetry.http_port: cannot listen on {place}: {reason}; {_ADVICE}"

    async def _live(self, _request: web.Request) -> web.Response:
        age, limit = self._heartbeat_age(), self._max_heartbeat_age_s
        is_live = age <= limit  # also false for NaN
        return _answer(is_live, {"live": is_live, "heartbeat_age_s": age, "max_heartbeat_age_s": limit})

    async def _ready(self, _request: web.Request) -> web.Response:
        is_ready, detail = self._readiness()
        return _answer(is_ready, {"ready": is_ready, "detail": detail})

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return web.Response(body=encode(self._registry), headers={"content-type": content_type})


def _answer(is_good: bool, body: dict[str, Any]) -> web.Response:
    return web.Response(
        status=200 if is_good else 503,
        body=orjson.dumps(body, default=str, option=orjson.OPT_NON_STR_KEYS),
        headers={"content-type": "application/json", "cache-control": "no-store"},
    )
