"""nginx with the settings that it has after installation, in front of the gateway."""

from __future__ import annotations

import asyncio
import json
import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import httpx_sse
import websockets

from tests.brokers.requirement import need
from tests.integration.gateway_here import free_port, gateway
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.integration.stage import Stage

CONFIGURATION = """
daemon off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://127.0.0.1:{gateway};{more}
        }}
    }}
}}
"""

# What docs/gateway.md says that websockets need.
WEBSOCKETS = """
            proxy_http_version 1.1;
            proxy_set_header Host $host:$server_port;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection "upgrade";"""


@asynccontextmanager
async def nginx(directory: Path, port: int, more: str = "") -> AsyncIterator[str]:
    """Run nginx in front of a port of this machine; yield its address."""
    executable = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if executable is None:
        need("nginx is not installed: apt-get install nginx-light")
    own = free_port()
    file = directory / "nginx.conf"
    file.write_text(CONFIGURATION.format(directory=directory, port=own, gateway=port, more=more))
    process = await asyncio.create_subprocess_exec(
        *(executable, "-p", str(directory), "-c", str(file), "-e", str(directory / "error.log")),
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await eventually((directory / "nginx.pid").exists, what=(directory / "error.log").read_text)
        yield f"http://127.0.0.1:{own}"
    finally:
        process.terminate()
        await process.wait()


async def test_event_stream_arrives_unbuffered_through_nginx_with_default_settings(
    apache: Stage, tmp_path: Path
) -> None:
    """Each delta is there before the next one is sent; the ending closes the response."""
    await apache.open()
    async with apache.worker(), gateway(apache) as running, nginx(tmp_path, running.port) as url:
        await apache.submit("j1", "practice?deltas=12&pace_ms=100")
        ages = []
        async with (
            httpx.AsyncClient(base_url=url, timeout=20) as http,
            httpx_sse.aconnect_sse(http, "GET", "/v1/jobs/j1/events?since=2020-01-01T00:00:00Z") as source,
        ):
            loop = asyncio.get_running_loop()
            arrived = [(loop.time(), json.loads(event.data)) async for event in source.aiter_sse()]

    assert [event for _, event in arrived] == apache.events("j1")
    deltas = [
        (at, event["ts"] / 1000)
        for at, event in arrived
        if event["type"] == "delta" and event["delta"].get("content")
    ]
    ages = [at - ts for at, ts in deltas]
    assert len(deltas) == 12
    assert max(ages) - min(ages) < 0.5  # buffered, the first one would be a second older than the last


async def test_job_is_submitted_and_followed_over_a_websocket_through_nginx(
    apache: Stage, tmp_path: Path
) -> None:
    """With the four lines that the documentation gives, the websocket passes, and so does the origin of the page."""
    await apache.open()
    request = {"model": "practice?deltas=5", "messages": [{"role": "user", "content": "Hi"}]}
    async with apache.worker(), gateway(apache) as running, nginx(tmp_path, running.port, WEBSOCKETS) as url:  # noqa: SIM117
        async with websockets.connect(
            url.replace("http", "ws") + "/v1/ws",
            subprotocols=[websockets.Subprotocol("streamworker.v1")],
            origin=websockets.Origin(url),
        ) as socket:
            job = {"type": "submit", "id": "a", "job": {"request": request}, "subscribe": True}
            await socket.send(json.dumps(job))
            events: list[dict[str, Any]] = []
            while not events or events[-1]["type"] != "usage":
                message = json.loads(await socket.recv())
                events += [message["event"]] if message["type"] == "event" else []

    assert events == apache.events(events[0]["job_id"])
