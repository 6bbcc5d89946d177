"""Idle connections that die, all at once, as those of common servers do after five seconds."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from streamworker.config import UpstreamSettings
from streamworker.model import Coordinates, Status, TopicPartition
from streamworker.testing import MemoryCommitStores, MemoryObserver, MemorySink
from streamworker.upstream.client import HttpUpstream
from streamworker.upstream.transport import HttpTransport
from streamworker.worker.committer import PartitionCommitter
from tests.streams import chunk, data, make_job
from tests.unit.worker.bench import JOBS, OneAttempt, make_policy, make_queues, make_tools
from tests.upstream.one_job import LoopClock
from tests.upstream.raw import EVENT_STREAM, chunked

if TYPE_CHECKING:
    from streamworker.model import UsageEvent

ANSWER = chunked(data(chunk({"content": "a"}), chunk({}, "stop"), b"[DONE]"), headers=EVENT_STREAM)
COUNT = 1000


class Server(asyncio.Protocol):
    """One connection of a server whose bodies come when `ready` is set, so that all calls are open at once."""

    open: set[Server]
    ready: asyncio.Event

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.open.add(self)

    def data_received(self, _: bytes) -> None:
        self.answering = asyncio.create_task(self.answer())

    async def answer(self) -> None:
        head, end, body = ANSWER.partition(b"\r\n\r\n")
        self.transport.write(head + end)
        await self.ready.wait()
        self.transport.write(body)

    def connection_lost(self, _: Exception | None) -> None:
        self.open.discard(self)


async def test_worker_with_a_thousand_dead_idle_connections_fails_no_job_and_counts_no_try() -> None:
    """No circuit opens; every job is completed by its first call."""
    Server.open, Server.ready = set(), asyncio.Event()
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, backlog=COUNT)
    port = server.sockets[0].getsockname()[1]
    transport = HttpTransport(keepalive_s=60)
    settings = UpstreamSettings(base_url=f"http://127.0.0.1:{port}/v1", connect_timeout_s=30)
    client = HttpUpstream(settings, transport=transport)
    observer, sink, clock = MemoryObserver(), MemorySink(), LoopClock()
    policy = make_policy(client, max_streams=COUNT, max_tries=1, circuit_failure_threshold=1)
    queues = make_queues(observer, {"default": policy}, max_in_flight=COUNT)
    tools = make_tools(sink, clock, observer, queues)
    broker = MemoryCommitStores()
    committer = PartitionCommitter(JOBS, broker.store(JOBS), commit_id="me", lost=lambda _: None)
    await committer.open()
    committing = asyncio.create_task(committer.run())

    async def run_all(first: int) -> list[UsageEvent]:
        for offset in range(first, first + COUNT):
            committer.progress.begin(offset)
            committer.progress.count(offset)
        runs = [
            OneAttempt(
                tools,
                make_job(source=Coordinates("jobs", 0, offset)),
                committer,
                to=TopicPartition("events", 0),
                upstream="default",
            ).play()
            for offset in range(first, first + COUNT)
        ]
        playing = asyncio.gather(*runs)
        if not Server.ready.is_set():
            while len(Server.open) < COUNT:  # noqa: ASYNC110 - connections that arrive send no notification
                await asyncio.sleep(0.01)
            Server.ready.set()
        return await playing

    try:
        async with asyncio.timeout(80):
            first = await run_all(0)
            assert transport.idle_connections == COUNT
            for connection in list(Server.open):
                connection.transport.abort()
            second = await run_all(COUNT)
    finally:
        committing.cancel()
        await asyncio.gather(committing, return_exceptions=True)
        await client.close()
        server.close()

    assert {end.status for end in first + second} == {Status.COMPLETED}
    assert {end.tries for end in second} == {1}
    assert observer.all("try_failed") == observer.all("circuit_changed") == []
