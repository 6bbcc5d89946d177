"""Brokers that do not answer, and groups that refuse a member: the worker says what it waits for, or ends."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import AIOKafkaConsumer, conn
from aiokafka.coordinator.assignors.roundrobin import RoundRobinPartitionAssignor
from structlog.testing import capture_logs

from streamworker.app import App
from streamworker.errors import KafkaRefused, KafkaUnavailable
from streamworker.gateway.app import GatewayApp
from streamworker.kafka import compat
from streamworker.kafka.sink import KafkaSink
from streamworker.kafka.topics import open_admin
from tests.integration.stage import Stage, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _no_throttle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log each unreachable broker, whatever an earlier test logged."""
    monkeypatch.setattr(compat, "_unreachable", {})


@contextmanager
def silent_server() -> Iterator[str]:
    """Accept connections in the kernel, and never answer."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"127.0.0.1:{server.getsockname()[1]}"


async def test_bootstrap_server_that_never_answers_delays_the_start_by_a_second(apache: Stage) -> None:
    """The next server of the list is asked meanwhile."""
    await apache.open()
    with silent_server() as silent:
        for servers in (f"{silent},{apache.broker.bootstrap}", f"{apache.broker.bootstrap},{silent}"):
            settings = apache.settings(kafka__bootstrap_servers=servers)
            began = time.monotonic()
            async with open_admin(settings) as admin:
                await admin.describe()
            assert time.monotonic() - began < 3


async def test_bootstrap_server_that_never_answers_is_named_within_its_time_limit(apache: Stage) -> None:
    """A log line after three seconds, an error at the time limit."""
    with silent_server() as silent, capture_logs() as logs:
        settings = apache.settings(kafka__bootstrap_servers=silent, kafka__request_timeout_s=4)
        with pytest.raises(KafkaUnavailable, match=f"{silent} did not answer within 4 s"):
            async with asyncio.timeout(10), open_admin(settings):
                pass

    assert [(line["event"], line["waited_s"], line["servers"]) for line in logs] == [
        ("kafka.connecting", 3, silent)  # and not kafka.not_answering besides
    ]
    assert "check kafka.bootstrap_servers" in logs[0]["reason"]


@pytest.mark.parametrize("kind", ["worker", "gateway"])
async def test_process_whose_broker_hangs_at_its_start_reports_it_within_three_seconds(
    apache: Stage, kind: str
) -> None:
    """Its probes and its port are open meanwhile."""
    with silent_server() as silent, capture_logs() as logs:
        settings = apache.settings(kafka__bootstrap_servers=silent, gateway__auth="off", gateway__port=0)
        app = App(settings) if kind == "worker" else GatewayApp(settings)
        began = time.monotonic()
        running = asyncio.create_task(app.run())
        await eventually(lambda: "kafka.connecting" in [line["event"] for line in logs])
        assert time.monotonic() - began < 4.5  # 3 s, and the start of the process's parts
        running.cancel()
        await asyncio.wait([running])

    assert {line["servers"] for line in logs if line["event"] == "kafka.connecting"} == {silent}


async def test_advertised_name_that_does_not_resolve_is_named(
    apache: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bootstrap server answers, and sends its clients to a name that nothing here knows."""
    await apache.open()
    connect = conn.create_conn

    async def elsewhere(host: str, port: int, *, on_close: Any = None, **named: Any) -> Any:
        if on_close is not None:  # a connection to a broker of the metadata
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return await connect(host, port, **named)

    monkeypatch.setattr(conn, "create_conn", elsewhere)
    settings = apache.settings(kafka__request_timeout_s=2)
    sink = KafkaSink(settings.kafka, [apache.events_topic])
    with capture_logs() as logs, pytest.raises(KafkaUnavailable) as failure:
        async with asyncio.timeout(10):
            await sink.start()
    await sink.stop()

    for text in (str(failure.value), logs[0]["reason"]):
        assert "this name is in the broker's advertised.listeners and does not resolve here" in text
    assert logs[0]["event"] == "kafka.broker_unreachable"
    assert logs[0]["broker"] == apache.broker.bootstrap


@pytest.mark.parametrize(
    ("over", "text"),
    [({"worker__session_timeout_s": 1800.0}, "set worker.session_timeout_s between the broker's group.min")],
)
async def test_group_that_refuses_the_member_ends_the_worker_with_advice(
    apache: Stage, monkeypatch: pytest.MonkeyPatch, over: dict[str, Any], text: str
) -> None:
    """The broker's default for group.max.session.timeout.ms is 30 minutes; the tests' broker has one too."""
    await apache.open()
    settings = apache.settings(**over)
    settings.worker.__dict__["session_timeout_s"] = 3600.0
    with pytest.raises(KafkaRefused, match=text):
        async with asyncio.timeout(20):
            await App(settings).run()


async def test_group_of_another_program_ends_the_worker_with_advice(apache: Stage) -> None:
    """INCONSISTENT_GROUP_PROTOCOL: a consumer with another assignor has the same group id."""
    await apache.open()
    foreign = AIOKafkaConsumer(
        apache.jobs_topic,
        bootstrap_servers=apache.broker.bootstrap,
        group_id=apache.group,
        partition_assignment_strategy=(RoundRobinPartitionAssignor,),
    )
    await foreign.start()
    try:
        with pytest.raises(
            KafkaRefused, match="another program is a member of this group, with another assignor"
        ):
            async with asyncio.timeout(20):
                await App(apache.settings()).run()
        assert foreign.assignment()
    finally:
        await foreign.stop()


@pytest.mark.long
async def test_member_that_holds_up_a_rebalance_is_reported(apache: Stage) -> None:
    """A worker that was killed counts until its session ends; its successor says so after three seconds."""
    await apache.open()
    dead = await apache.process(worker__session_timeout_s=10)
    await dead.logged("worker.started")
    await dead.kill()
    with capture_logs() as logs:
        async with apache.worker(worker__session_timeout_s=10):
            await eventually(lambda: [line for line in logs if line["event"] == "worker.started"])
    [line] = [line for line in logs if line["event"] == "group.joining"]

    assert line["waited_s"] == 3
    assert "for a member that has not rejoined at most 10 s" in line["reason"]
