"""A gateway on a free port of this machine, over an event log in memory."""

from __future__ import annotations

import base64
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp

from streamworker.app import SystemClock
from streamworker.config import load
from streamworker.gateway.app import application
from streamworker.gateway.auth import Authenticator
from streamworker.gateway.drain import Drain
from streamworker.gateway.gateway import Gateway
from streamworker.gateway.jobs import Jobs
from streamworker.gateway.keys import digest_of
from streamworker.gateway.limits import Limits
from streamworker.gateway.server import Server
from streamworker.observe import UNTRACED_REQUESTS
from streamworker.telemetry import gateway_metrics as table
from streamworker.telemetry.metrics import PREFIX, Metrics
from tests.unit.gateway.memory import MemoryLog, MemoryWriter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence
    from pathlib import Path

    from streamworker.observe import RequestTracer
    from tests.unit.gateway.batches import MemoryBatches

ACME, OTHER, ALL, READ_ONLY = "swk_acme-key", "swk_other-key", "swk_all-key", "swk_read-only-key"
SECRET = base64.urlsafe_b64encode(b"a secret of at least thirty-two bytes").decode().rstrip("=")

KEYS: Mapping[str, tuple[str, Sequence[str]]] = {
    ACME: ("acme", ("submit", "read", "cancel", "token")),
    OTHER: ("other", ("submit", "read", "cancel", "token")),
    ALL: ("", ("submit", "read", "cancel", "token")),
    READ_ONLY: ("acme", ("read",)),
}


def keys_file(directory: Path, **limits: int) -> Path:
    """Write the keys of the tests; return the file."""
    path = directory / "keys.toml"
    more = "".join(f"{name} = {value}\n" for name, value in limits.items())
    path.write_text(
        "".join(
            f'[keys.k{number}]\nsha256 = "{digest_of(key)}"\ntenant = "{tenant}"\nscopes = {list(scopes)!r}\n{more}'
            for number, (key, (tenant, scopes)) in enumerate(KEYS.items())
        )
    )
    return path


def secrets_file(directory: Path) -> Path:
    """Write the secrets of read tokens; return the file."""
    path = directory / "secrets"
    path.write_text(f"# secrets\nfirst:{SECRET}\n")
    return path


class Served:
    """A gateway that is served, and a client of it."""

    def __init__(self, gateway: Gateway, server: Server, http: aiohttp.ClientSession) -> None:
        self.gateway = gateway
        self.server = server
        self.http = http
        log, writer = gateway.event_log, gateway.jobs._writer
        assert isinstance(log, MemoryLog)
        assert isinstance(writer, MemoryWriter)
        self.log = log
        self.writer = writer

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        return "127.0.0.1", self.server.port

    @property
    def url(self) -> str:
        """The base URL."""
        return f"http://127.0.0.1:{self.server.port}"

    @property
    def unsent_bytes(self) -> int:
        """Bytes that wait in the transports of all connections."""
        server: Any = self.server._runner.server
        connections = [*server.connections, *self.server._streams]
        transports = [one.transport for one in connections if one.transport is not None]
        return sum(int(transport.get_write_buffer_size()) for transport in transports)

    def metric(self, name: str, **labels: str) -> float:
        """Return the value of a metric; 0 if its series does not exist."""
        return self.gateway.metrics.registry.get_sample_value(PREFIX + name, labels) or 0.0

    async def call(
        self, method: str, path: str, *, key: str | None = ACME, **options: Any
    ) -> tuple[int, Any, Mapping[str, str]]:
        """Send a request; return status, body (decoded if it is JSON) and headers."""
        headers = dict(options.pop("headers", {}))
        if key is not None:
            headers.setdefault("Authorization", f"Bearer {key}")
        async with self.http.request(method, self.url + path, headers=headers, **options) as response:
            text = await response.text()
            is_json = response.content_type == "application/json" and text
            return response.status, (await response.json()) if is_json else text, response.headers

    async def submit(self, **members: Any) -> str:
        """Submit a job as acme; return its id."""
        job = {"request": {"model": "m", "messages": [{"role": "user", "content": "hi"}]}, **members}
        status, value, _ = await self.call("POST", "/v1/jobs", json=job)
        assert status == 202, value
        return str(value["job_id"])


@asynccontextmanager
async def served(
    directory: Path,
    *,
    limits: Mapping[str, int] | None = None,
    batches: MemoryBatches | None = None,
    tracer: RequestTracer = UNTRACED_REQUESTS,
    **settings: Any,
) -> AsyncIterator[Served]:
    """Serve a gateway; `settings` are those of `[gateway]`."""
    environ = {
        "STREAMWORKER_GATEWAY__KEYS_FILE": str(keys_file(directory, **(limits or {}))),
        "STREAMWORKER_GATEWAY__TOKEN_SECRETS_FILE": str(secrets_file(directory)),
        **{f"STREAMWORKER_GATEWAY__{name.upper()}": str(value) for name, value in settings.items()},
    }
    loaded = load(None, environ, needs_keys=False)
    metrics, log = Metrics(table=table.GATEWAY_TABLE), MemoryLog()
    counted = Limits()
    gateway = Gateway(
        settings=loaded,
        event_log=log,
        jobs=Jobs(loaded, log, MemoryWriter(), metrics),
        authenticator=Authenticator(
            loaded, admit=counted.admit, refused=lambda code: metrics.add(table.AUTH_FAILURES, 1, code)
        ),
        limits=counted,
        metrics=metrics,
        clock=SystemClock(),
        drain=Drain(loaded.gateway.drain_s),
        tracer=tracer,
        batches=batches,  # type: ignore[arg-type]  # in memory
    )
    running: list[Server] = []
    app = application(gateway, lambda: running[0].is_full)
    server = Server(app, "127.0.0.1", 0)
    running.append(server)
    await server.start()
    try:
        async with aiohttp.ClientSession() as http:
            yield Served(gateway, server, http)
    finally:
        await server.stop()
