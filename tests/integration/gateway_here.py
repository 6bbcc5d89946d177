"""Gateways for tests: in this process, or as processes of their own that can be killed."""

from __future__ import annotations

import asyncio
import secrets
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

from streamworker.gateway.app import GatewayApp
from tests.integration.stage import STOP_S, Stage, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from streamworker.practice import PracticeUpstream
    from tests.brokers.apache import ApacheKafka

__all__ = ["Gateway", "free_port", "gateway", "stage_on"]


@asynccontextmanager
async def stage_on(
    kafka: ApacheKafka, practice: PracticeUpstream, directory: Path, **arguments: Any
) -> AsyncIterator[Stage]:
    """Open a stage that several tests share."""
    tag = secrets.token_hex(4)
    async with Stage(kafka, practice, lambda name: f"shared.{name}.{tag}", directory) as stage:
        await stage.open(**arguments)
        yield stage


def free_port() -> int:
    """Return a port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Gateway:
    """A gateway in this process and loop. It can be stopped and started again on its port."""

    def __init__(self, stage: Stage, **over: object) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        fixed = {"gateway__auth": "off", "gateway__drain_s": 1, "gateway__port": self.port}
        self.settings = stage.settings(**{**fixed, **over})
        self._app: GatewayApp | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start it and wait until it is ready."""
        app = self._app = GatewayApp(self.settings)
        task = self._task = asyncio.create_task(app.run())
        await eventually(lambda: app.is_working or task.done())
        if task.done():
            task.result()

    async def stop(self) -> None:
        """Drain it, if it runs."""
        if self._task is None or self._app is None:
            return
        self._app.drain()
        done, _ = await asyncio.wait([self._task], timeout=STOP_S)
        assert done, "the gateway did not stop"
        self._task.result()
        self._task = None

    async def restart(self) -> None:
        """Drain it and start it again."""
        await self.stop()
        await self.start()


@asynccontextmanager
async def gateway(stage: Stage, **over: Any) -> AsyncIterator[Gateway]:
    """Run a gateway; `over` are settings, as in `gateway__auth="keys"`."""
    async with Gateway(stage, **over) as running:
        yield running
