"""Gateways in front of a stage's topics, in this process or in one of their own, and what a client needs of them."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx

from streamworker.demo.child import free_port
from streamworker.gateway.app import GatewayApp
from streamworker.gateway.keys import digest_of
from tests.integration.stage import STOP_S, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from streamworker.telemetry.metrics import Metrics
    from tests.integration.stage import Process, Stage

__all__ = ["KEY", "Gateway", "events_in", "gateway", "gateway_process", "open_keys"]

KEY = "swk_integration-test-key"


def open_keys(stage: Stage, directory: Path) -> None:
    """Write a keys file with `KEY` for tenant acme, and a secret for tokens; name both in the stage's settings."""
    keys, secrets = directory / "keys.toml", directory / "secrets"
    keys.write_text(
        f'[keys.test]\nsha256 = "{digest_of(KEY)}"\ntenant = "acme"\n'
        'scopes = ["submit", "read", "cancel", "token"]\n'
    )
    secrets.write_text("one:MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY\n")
    stage.variables |= {
        "GATEWAY__KEYS_FILE": str(keys),
        "GATEWAY__TOKEN_SECRETS_FILE": str(secrets),
        "GATEWAY__PORT": "0",
    }


class Gateway:
    """A gateway that is served, and a client of it."""

    def __init__(self, port: int, http: httpx.AsyncClient, app: GatewayApp | None = None) -> None:
        self.port = port
        self.http = http
        self._app = app

    @property
    def metrics(self) -> Metrics:
        """The metrics of a gateway in this process."""
        assert self._app is not None
        return self._app.metrics

    async def submit(self, model: str = "practice?deltas=5", **members: Any) -> dict[str, Any]:
        """Submit a job; return what the gateway answers."""
        job = {"request": {"model": model, "messages": [{"role": "user", "content": "hi"}]}, **members}
        response = await self.http.post("/v1/jobs", json=job)
        assert response.status_code == 202, response.text
        return dict(response.json())

    async def events(
        self, path: str, cursor: str | None = None, limit: int | None = None
    ) -> list[dict[str, Any]]:
        """Read an event stream to its end, or until `limit` events; return the events with their ids."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": cursor} if cursor else {})
        found: list[dict[str, Any]] = []
        async with self.http.stream("GET", path, headers=headers) as response:
            assert response.status_code == 200, await response.aread()
            async for event in events_in(response):
                found.append(event)
                if limit is not None and len(found) >= limit:
                    break
        return found


async def events_in(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the events of an event stream: `event`, `id`, `data`."""
    unread = b""
    async for (
        data
    ) in response.aiter_bytes():  # lines end in line feeds only: httpx's lines also end in U+2028
        *blocks, unread = (unread + data).split(b"\n\n")
        for block in blocks:
            lines = [line.partition(": ") for line in block.decode().split("\n") if line[:1] != ":"]
            fields = {name: value for name, _, value in lines if name != "retry"}  # drawn per connection
            if "data" in fields:
                yield {**fields, "data": json.loads(fields["data"])}


def _client(port: int) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {KEY}"}, timeout=30
    )


@asynccontextmanager
async def gateway(stage: Stage, **over: object) -> AsyncIterator[Gateway]:
    """Run a gateway in this process and loop; drain it at the end."""
    app = GatewayApp(stage.settings(**over))
    running = asyncio.create_task(app.run())
    try:
        await eventually(lambda: app.is_working or running.done())
        if running.done():
            running.result()
        async with _client(app.port) as http:
            yield Gateway(app.port, http, app)
    finally:
        app.drain()
        done, _ = await asyncio.wait([running], timeout=STOP_S)
        assert done, "the gateway did not stop"
        running.result()


@asynccontextmanager
async def gateway_process(stage: Stage, **over: object) -> AsyncIterator[tuple[Gateway, Process]]:
    """Run a gateway process; it may be killed meanwhile."""
    port = free_port()
    process = await stage.start_command("gateway", {"gateway__port": port, **over})
    await process.logged("gateway.started")
    async with _client(port) as http:
        yield Gateway(port, http), process
