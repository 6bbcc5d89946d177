"""The probes, through real sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from streamworker.errors import StreamworkerError
from streamworker.telemetry import metrics as table
from streamworker.telemetry.metrics import Metrics
from streamworker.telemetry.probes import Probes


class Worker:
    """The state that the probes report."""

    def __init__(self) -> None:
        self.age_s = 0.5
        self.is_ready = True
        self.detail: dict[str, Any] = {}

    def readiness(self) -> tuple[bool, dict[str, Any]]:
        return self.is_ready, self.detail


@pytest.fixture
def worker() -> Worker:
    return Worker()


def probes_of(
    worker: Worker, port: int = 0, host: str = "127.0.0.1", metrics: Metrics | None = None
) -> Probes:
    return Probes(
        host=host,
        port=port,
        registry=(metrics or Metrics()).registry,
        heartbeat_age=lambda: worker.age_s,
        readiness=worker.readiness,
        max_heartbeat_age_s=60,
    )


@pytest.fixture
async def probes(worker: Worker) -> AsyncIterator[Probes]:
    probes = probes_of(worker)
    await probes.start()
    yield probes
    await probes.stop()


async def get(probes: Probes, path: str, **headers: str) -> tuple[int, str, bytes]:
    url = f"http://127.0.0.1:{probes.port}{path}"
    async with aiohttp.ClientSession() as session, session.get(url, headers=headers) as answer:
        return answer.status, answer.headers["content-type"], await answer.read()


async def test_livez_while_the_poll_loop_runs_returns_200(probes: Probes, worker: Worker) -> None:
    expected = b'{"live":true,"heartbeat_age_s":0.5,"max_heartbeat_age_s":60}'
    assert await get(probes, "/livez") == (200, "application/json", expected)
    worker.is_ready = False
    assert (await get(probes, "/livez"))[0] == 200


@pytest.mark.parametrize(
    ("age", "shown"), [(60.5, b"60.5"), (float("inf"), b"null"), (float("nan"), b"null")]
)
async def test_livez_when_the_poll_loop_is_stuck_returns_503(
    probes: Probes, worker: Worker, age: float, shown: bytes
) -> None:
    worker.age_s = age
    status, _, body = await get(probes, "/livez")
    assert status == 503
    assert body == b'{"live":false,"heartbeat_age_s":' + shown + b',"max_heartbeat_age_s":60}'


async def test_readyz_of_a_worker_that_is_not_ready_returns_503_with_the_detail(
    probes: Probes, worker: Worker
) -> None:
    assert await get(probes, "/readyz") == (200, "application/json", b'{"ready":true,"detail":{}}')
    worker.is_ready, worker.detail = False, {"kafka": "unreachable for 12 s"}
    expected = b'{"ready":false,"detail":{"kafka":"unreachable for 12 s"}}'
    assert await get(probes, "/readyz") == (503, "application/json", expected)


async def test_metrics_are_served_in_the_requested_format(worker: Worker) -> None:
    metrics = Metrics()
    metrics.add(table.TOMBSTONES, 3)
    probes = probes_of(worker, metrics=metrics)
    await probes.start()
    status, content_type, body = await get(probes, "/metrics")
    assert (status, content_type.partition(";")[0]) == (200, "text/plain")
    assert b"\nstreamworker_tombstones_total 3.0\n" in body
    _, content_type, body = await get(
        probes, "/metrics", accept="application/openmetrics-text; version=1.0.0"
    )
    assert content_type.partition(";")[0] == "application/openmetrics-text"
    assert body.endswith(b"# EOF\n")
    await probes.stop()


async def test_unknown_path_returns_404(probes: Probes) -> None:
    assert (await get(probes, "/"))[0] == 404


async def test_request_is_not_logged(probes: Probes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(1)
    await get(probes, "/livez")
    assert [record.name for record in caplog.records if record.name.startswith("aiohttp")] == []


async def test_port_in_use_raises_with_the_name_of_its_setting(worker: Worker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        probes = probes_of(worker, port)
        with pytest.raises(StreamworkerError) as caught:
            await probes.start()
        await probes.stop()
    fault = f"telemetry.http_port: 127.0.0.1:{port} is in use, perhaps by another worker or gateway on this machine; choose another port, or 0 for a free one"
    assert fault in str(caught.value)


async def test_address_of_another_host_raises(worker: Worker) -> None:
    with pytest.raises(
        StreamworkerError, match=r"telemetry\.http_port: cannot listen on 192\.0\.2\.1:0: Cannot assign"
    ):
        await probes_of(worker, host="192.0.2.1").start()


async def test_stop_closes_idle_connections_and_may_be_called_twice(worker: Worker) -> None:
    probes = probes_of(worker)
    await probes.stop()
    await probes.start()
    reader, writer = await asyncio.open_connection("127.0.0.1", probes.port)
    writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    assert (await reader.readline()) == b"HTTP/1.1 200 OK\r\n"
    await asyncio.wait_for(probes.stop(), 5)
    await probes.stop()
    assert (await reader.read()).endswith(b"}")
    writer.close()
    with pytest.raises(OSError, match="onnect"):
        await asyncio.open_connection("127.0.0.1", probes.port)
