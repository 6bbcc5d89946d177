"""A gateway process from its start to its end, over an event log and a writer in memory; and the metrics of its reader."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from structlog.testing import capture_logs

from streamworker.config import load
from streamworker.errors import ConfigurationError, KafkaRefused, KafkaUnavailable
from streamworker.gateway import app as module
from streamworker.gateway.app import GatewayApp
from streamworker.gateway.log_metrics import LogMetrics
from streamworker.telemetry import gateway_metrics as table
from streamworker.telemetry.metrics import PREFIX, Metrics
from tests.integration.stage import eventually
from tests.unit.gateway.memory import MemoryLog, MemoryWriter

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable


class Writer(MemoryWriter):
    """A writer with the life of `KafkaWriter`."""

    unacknowledged_bytes = 7

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.is_ready = False
        self._case = case

    async def start(self) -> None:
        await self._case.connect("writer")
        self.is_ready = True

    async def stop(self) -> None:
        self._case.steps.append("writer stopped")


class Log(MemoryLog):
    """An event log that is ready when it was started."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.is_ready = False
        self._case = case

    async def start(self) -> None:
        await self._case.connect("log")
        self.is_ready = True

    async def stop(self) -> None:
        self._case.steps.append("log stopped")


class BatchesOfTest:
    """Batches that are ready when they were started."""

    is_ready = False

    def __init__(self, case: Case) -> None:
        self._case = case

    async def start(self) -> None:
        await self._case.connect("batches")
        self.is_ready = True

    async def stop(self) -> None:
        self._case.steps.append("batches stopped")


class Case:
    """A gateway app, and what its parts did. `faults` are raised by the next connections."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.faults: list[Exception] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.log, self.writer, self.batches = Log(self), Writer(self), BatchesOfTest(self)
        self.app: Any = None

    async def connect(self, part: str) -> None:
        """Connect, once the gate is open."""
        await self.gate.wait()
        self.steps.append(part)
        if self.faults:
            raise self.faults.pop(0)

    def make(self, **settings: str) -> GatewayApp:
        """Make the app. `settings` are environment variables without the prefix."""
        variables = {
            "TELEMETRY__HTTP_HOST": "127.0.0.1", "TELEMETRY__HTTP_PORT": "0", "GATEWAY__PORT": "0",
            "GATEWAY__AUTH": "off", "GATEWAY__DRAIN_S": "1",
        }  # fmt: skip
        environ = {f"STREAMWORKER_{name}": value for name, value in (variables | settings).items()}
        self.app = GatewayApp(load(None, environ, needs_keys=False))
        return self.app  # type: ignore[no-any-return]

    @asynccontextmanager
    async def running(self, **settings: str) -> AsyncIterator[asyncio.Task[None]]:
        """Run the app; it is drained at the end, if the test has not done it."""
        task = asyncio.create_task(self.make(**settings).run())
        try:
            serving = asyncio.create_task(self.app.serving())
            await asyncio.wait([task, serving], return_when=asyncio.FIRST_COMPLETED)
            serving.cancel()
            yield task
        finally:
            self.app.drain()
            await asyncio.wait_for(task, 10)

    async def get(self, path: str) -> tuple[int, Any]:
        """Send a request to the gateway."""
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"http://127.0.0.1:{self.app.port}{path}") as response,
        ):
            return response.status, await response.text()

    def value(self, name: str, **labels: str) -> float | None:
        """Return the value of a metric."""
        found: float | None = self.app.metrics.registry.get_sample_value(PREFIX + name, labels)
        return found


@pytest.fixture
async def case(monkeypatch: pytest.MonkeyPatch) -> Case:
    """Return the parts of an app that has not started. It does not wait between connections."""
    made = Case()
    monkeypatch.setattr(module, "KafkaWriter", lambda *_: made.writer)
    monkeypatch.setattr(module, "_open_log", lambda *_: made.log)
    monkeypatch.setattr(module, "Batches", lambda *_: made.batches)
    monkeypatch.setattr(module, "_CONNECT_BACKOFF_S", (0.0,))
    monkeypatch.setattr(module, "raise_nofile_limit", lambda _: None)
    return made


async def test_gateway_serves_before_it_is_connected_and_is_ready_after(case: Case) -> None:
    """The page and the documentation need no Kafka; probes say that it is connecting."""
    case.gate.clear()
    async with case.running():
        assert (await case.get("/openapi.json"))[0] == 200
        await eventually(lambda: case.app._server.connections == 0)
        assert case.app._readiness() == (False, {"connecting": True, "connections": 0})
        assert (case.value("ready"), case.app.is_working) == (0.0, False)
        assert case.app._heartbeat_age() == 0.0
        case.gate.set()
        await eventually(lambda: case.app.is_working)
        assert case.app._readiness() == (True, {"connected": True, "connections": 0})
        assert (case.value("ready"), case.value("sink_unacknowledged_bytes")) == (1.0, 7.0)

    assert case.steps == ["writer", "log", "writer stopped", "log stopped"]


async def test_gateway_with_batches_is_ready_when_their_state_was_read(case: Case) -> None:
    """They are stopped first: their runs write through Kafka until they end."""
    async with case.running(TOPICS__RESULTS="results", TOPICS__BATCHES="batches"):
        await eventually(lambda: case.app.is_working)
        case.batches.is_ready = False
        assert not case.app.is_working

    assert case.steps == ["writer", "log", "batches", "batches stopped", "writer stopped", "log stopped"]


async def test_gateway_connects_again_until_kafka_is_available(case: Case) -> None:
    """Each failure is logged with its reason and counted; what is connected is not connected again."""
    case.faults = [KafkaUnavailable("first"), KafkaUnavailable("second")]
    with capture_logs() as logs:
        async with case.running():
            await eventually(lambda: case.app.is_working)
            assert case.value("kafka_failures_total", part="start") == 2

    assert [entry["reason"] for entry in logs if entry["event"] == "kafka.unavailable"] == ["first", "second"]
    assert case.steps[:4] == ["writer", "writer", "writer", "log"]


async def test_waits_between_connections_grow_to_five_seconds(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that comes back is found soon, and one that is away is not asked all the time."""
    monkeypatch.setattr(module, "_CONNECT_BACKOFF_S", (0.001, 0.002, 0.003))
    case.faults = [KafkaUnavailable("away") for _ in range(5)]
    with capture_logs() as logs:
        async with case.running():
            await eventually(lambda: case.app.is_working)

    waits = [entry["next_try_s"] for entry in logs if entry["event"] == "kafka.unavailable"]
    assert waits == [0.001, 0.002, 0.003, 0.003, 0.003]


async def test_connection_that_takes_long_is_logged(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the brokers' names; once it is made, nothing more is logged of it."""
    monkeypatch.setattr(module, "_HINT_S", 0.01)
    case.gate.clear()
    with capture_logs() as logs:
        async with case.running(KAFKA__BOOTSTRAP_SERVERS="kafka:9092"):
            await eventually(lambda: any(entry["event"] == "gateway.connecting" for entry in logs))
            case.gate.set()
            await eventually(lambda: case.app.is_working)
            await asyncio.sleep(0.02)

    hints = [entry for entry in logs if entry["event"] == "gateway.connecting"]
    assert [entry["brokers"] for entry in hints] == ["kafka:9092"]


@pytest.mark.parametrize("error", [KafkaRefused("topic jobs does not exist"), ConfigurationError(["x"])])
async def test_gateway_that_is_refused_ends_with_the_reason(case: Case, error: Exception) -> None:
    """An operator must change something: trying again would not help."""
    case.faults = [error]
    with pytest.raises(type(error)) as raised:
        async with case.running() as task:
            await asyncio.wait([task])

    assert raised.value is error
    assert case.steps == ["writer", "writer stopped", "log stopped"]


async def test_gateway_drains_before_it_was_connected(case: Case) -> None:
    """A rollout that goes wrong can be taken back while no broker answers."""
    case.gate.clear()
    async with case.running() as task:
        case.app.drain()
        await asyncio.wait_for(task, 5)

    assert case.steps == ["writer stopped", "log stopped"]


async def test_gateway_that_drains_is_not_ready_and_ends(case: Case) -> None:
    """Its probe says for how long it has drained, and how many requests go on."""
    async with case.running() as task:
        await eventually(lambda: case.app.is_working)
        with case.app._drain.request():
            case.app.drain()
            case.app.drain()
            is_ready, detail = case.app._readiness()
            assert (is_ready, detail["requests"], case.app.is_working) == (False, 1, False)
            assert 0 <= detail["draining_s"] < 1
            assert not task.done()
        await asyncio.wait_for(task, 5)


async def test_gateway_whose_reader_has_crashed_is_not_alive(case: Case) -> None:
    """Only a restart helps; while it has not started yet, it is alive."""
    async with case.running():
        await eventually(lambda: case.app._has_started)
        assert case.app._heartbeat_age() == 0.0
        case.log.is_ready = False
        assert case.app._heartbeat_age() == inf
        assert not case.app.is_working


async def test_app_that_does_not_run_has_no_port_and_drains_nothing(case: Case) -> None:
    """A signal may come before the loop has begun."""
    app = case.make()
    app.drain()

    assert (app.port, app.is_working) == (0, False)


async def test_port_that_is_taken_stops_everything_that_was_started(case: Case) -> None:
    """The message names the setting."""
    async with case.running():
        second = Case()
        with pytest.raises(ConfigurationError, match=r"gateway\.port"):
            await case_of(second, case.app.port)

    assert second.steps == ["writer stopped", "log stopped"]


async def case_of(second: Case, port: int) -> None:
    """Run another app on the same port."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "KafkaWriter", lambda *_: second.writer)
        patch.setattr(module, "_open_log", lambda *_: second.log)
        await second.make(GATEWAY__PORT=str(port)).run()


def test_log_of_the_app_has_no_password(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    """The configured secrets are removed from every line."""
    app = case.make(
        KAFKA__SECURITY_PROTOCOL="SASL_SSL",
        KAFKA__SASL_MECHANISM="PLAIN",
        KAFKA__SASL_USERNAME="user",
        KAFKA__SASL_PASSWORD="hunter2-hunter2",
        TELEMETRY__LOG_FORMAT="json",
    )
    app.configure_logging()
    module.log.warning("failed", reason="refused hunter2-hunter2")

    output = capsys.readouterr().out
    assert "refused" in output
    assert "hunter2" not in output


# The reader's metrics


@pytest.mark.parametrize(
    ("call", "name", "labels", "value"),
    [
        (lambda log: (log.subscribed(3), log.subscribed(-1)), "gateway_subscriptions", {}, 2),
        (
            lambda log: (log.followed_changed(5), log.followed_changed(4)),
            "gateway_partitions_followed",
            {},
            4,
        ),
        (lambda log: log.replay_began("cursor"), "gateway_replays_total", {"kind": "cursor"}, 1),
        (lambda log: (log.scanned(5), log.scanned(2)), "gateway_records_scanned_total", {}, 7),
        (
            lambda log: log.searched("found", 8, 0.5),
            "gateway_searched_records_total",
            {"outcome": "found"},
            8,
        ),
        (
            lambda log: log.searched("found", 8, 0.5),
            "gateway_search_duration_seconds_sum",
            {"outcome": "found"},
            0.5,
        ),
        (lambda log: log.mailbox_overflowed(), "gateway_mailbox_overflows_total", {}, 1),
        (lambda log: (log.history_changed(9), log.history_changed(6)), "gateway_history_bytes", {}, 6),
    ],
)
def test_metric_of_the_reader(
    call: Callable[[LogMetrics], Any], name: str, labels: dict[str, str], value: float
) -> None:
    """Sums grow, and states are the last ones."""
    metrics = Metrics(table=table.GATEWAY_TABLE)
    call(LogMetrics(metrics))

    assert metrics.registry.get_sample_value(PREFIX + name, labels) == value
