"""What the demo does before its first act, and what it reports where it cannot go on."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING

import pytest

pytest.importorskip("noida_db", reason="needs the demo extra")

from streamworker.demo.account import Verdict
from streamworker.demo.play import _within, play
from streamworker.demo.probe import get
from streamworker.demo.stage import set_up
from streamworker.errors import StreamworkerError
from streamworker.practice import PracticeUpstream

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator
    from pathlib import Path

UPSTREAM = "STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL"


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


async def reported(base_url: str, **variables: str) -> tuple[str, float]:
    begun = time.monotonic()
    with pytest.raises(StreamworkerError) as raised:
        async with set_up(lambda _: None, {UPSTREAM: base_url, **variables}):
            pass
    return str(raised.value), time.monotonic() - begun


async def test_upstream_that_refuses_connections_is_reported_at_once() -> None:
    """With the variable that names it; no broker is started before."""
    text, seconds = await reported("http://127.0.0.1:9/v1")

    assert "http://127.0.0.1:9/v1" in text
    assert UPSTREAM in text
    assert seconds < 3


async def test_upstream_that_does_not_answer_is_reported_within_3_s(silent: str) -> None:
    """A visitor does not wait for a timeout of the worker."""
    text, seconds = await reported(silent)

    assert "no answer within 2.5 s" in text
    assert seconds < 3


async def test_upstream_that_refuses_the_key_is_reported() -> None:
    """Its jobs would wait for another key."""
    async with PracticeUpstream(api_key="right") as practice:
        text, _ = await reported(
            practice.base_url, STREAMWORKER_UPSTREAMS__DEFAULT__API_KEY_ENV="KEY", KEY="wrong-key"
        )

    assert "auth" in text
    assert "wrong-key" not in text


async def test_configured_upstream_needs_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo cannot know one."""
    async with PracticeUpstream() as practice:
        monkeypatch.setenv(UPSTREAM, practice.base_url)
        with pytest.raises(StreamworkerError, match="demo --model NAME"):
            await play(model=None)


async def test_probe_of_a_silent_or_closed_port_is_status_0(silent: str) -> None:
    """It waits for at most two seconds, and never raises."""
    port = int(silent.rpartition(":")[2].partition("/")[0])

    assert await get("127.0.0.1", port, "/") == (0, b"")
    assert await get("127.0.0.1", 9, "/") == (0, b"")


async def test_probe_returns_status_and_body() -> None:
    """Of any HTTP server."""
    async with PracticeUpstream() as practice:
        status, body = await get("127.0.0.1", practice.port, "/v1/models")

    assert status == 200
    assert b"practice" in body


async def test_workers_share_the_partitions_before_the_first_job() -> None:
    """Each of them owns two: a first assignment that is only half open does not count."""
    async with set_up(lambda _: None, {}) as stage:
        first = await stage.wait_until_shared()
        assert len(first) == 2
        assert await stage.second.owns(2)
        assert not await stage.second.owns(4)


async def test_second_worker_reads_no_configuration_file(tmp_path: Path) -> None:
    """A user's file may have paid upstreams, or settings that do not fit the demo's topics, which would end the worker."""
    file = tmp_path / "worker.toml"
    file.write_text('[topics]\njobs = ["mine"]\nweights = { mine = 4 }\n')

    async with set_up(lambda _: None, {"STREAMWORKER_CONFIG": str(file)}) as stage:
        assert len(await stage.wait_until_shared()) == 2
        assert stage.second.running


async def test_error_of_a_task_is_reported_alone() -> None:
    """Without a traceback of the group that the task belongs to."""

    async def fail() -> None:
        raise StreamworkerError("the broker is gone")

    async def work(task: Callable[[], Coroutine[None, None, None]]) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(task())

    with pytest.raises(StreamworkerError, match="the broker is gone"):
        await _within(work(fail))


def test_verdict_is_one_line() -> None:
    """As the account prints it."""
    assert str(Verdict(8, 8, 0, 0)) == "audit: 8 jobs, 8 endings, 0 breaches"
    assert str(Verdict(8, 8, 0, 3)) == "audit: 8 jobs, 8 endings, 3 attempts superseded, 0 breaches"
