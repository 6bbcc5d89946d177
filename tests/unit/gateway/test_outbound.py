"""What is written to one client: the waiting for it, its stalling, and the turns of several streams."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.gateway.outbound import Outbound, Starved
from streamworker.gateway.stream_connection import StreamConnection

if TYPE_CHECKING:
    from collections.abc import Coroutine


class Transport(asyncio.Transport):
    """Holds what is written until the client takes it."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting = 0
        self.is_aborted = False
        self.protocol: Any = None

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocol = protocol

    def is_closing(self) -> bool:
        return self.is_aborted

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.waiting += len(data)
        if self.waiting > 100 and not self.protocol.is_paused:
            self.protocol.pause_writing()

    def take(self, count: int) -> None:
        """Pass bytes on to the client."""
        self.waiting -= count
        if self.waiting <= 20 and self.protocol.is_paused:
            self.protocol.resume_writing()

    def get_write_buffer_size(self) -> int:
        return self.waiting

    def abort(self) -> None:
        self.is_aborted = True


class Owner:
    """Stands for the server."""

    def adopt(self, *_: object, **__: object) -> None: ...
    def forget(self, _: StreamConnection) -> None: ...


class Bench:
    """An outbound over a transport in memory."""

    def __init__(self, stall_s: float = 60) -> None:
        self.transport = Transport()
        self.stalls = self.holds = 0
        self.stalled = asyncio.Event()
        self.connection = StreamConnection(self.transport, Owner())
        self.out = Outbound(self.connection, stall_s, hold=self._note_hold, stalled=self._note)

    def _note_hold(self) -> None:
        self.holds += 1

    def _note(self) -> None:
        self.stalls += 1
        self.stalled.set()


async def begun(waiting: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run a coroutine in a task up to its first wait."""
    task = asyncio.create_task(waiting)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_outbound_is_full_until_the_client_has_taken_nearly_all() -> None:
    """As the transport says: above its high limit, until the low one."""
    bench = Bench()
    bench.out.write(b"x" * 100)
    assert not bench.out.is_full
    bench.out.write(b"x")
    assert bench.out.is_full
    bench.transport.take(60)
    assert bench.out.is_full
    bench.transport.take(30)
    assert not bench.out.is_full


async def test_outbound_that_is_full_lets_all_streams_wait_until_the_client_takes_it() -> None:
    """The stall is watched while anyone waits."""
    bench = Bench()
    bench.out.write(b"x" * 200)
    waiting = [await begun(bench.out.drained()) for _ in range(2)]
    assert not any(task.done() for task in waiting)
    bench.transport.take(200)
    await asyncio.wait_for(asyncio.gather(*waiting), 1)
    assert bench.stalls == 0


async def test_outbound_holds_what_is_pushed_once_for_each_time_that_it_becomes_full() -> None:
    """Also where it was full before: the transport reports that once only."""
    bench = Bench()
    for _ in range(2):
        bench.out.write(b"x" * 150)
        bench.out.write(b"x" * 150)
        bench.transport.take(300)
    assert bench.holds == 2
    bench.out.write(b"x" * 150)
    holds: list[int] = []
    late = Outbound(bench.connection, 60, hold=lambda: holds.append(1), stalled=bench.stalled.set)
    assert holds == [1]
    late.stop()
    bench.out.stop()


@pytest.mark.parametrize("is_awaited", [True, False])
async def test_outbound_reports_a_client_that_takes_nothing(*, is_awaited: bool) -> None:
    """For `stall_s`, whether a stream waits or its job is quiet; what is written meanwhile is not progress."""
    bench = Bench(stall_s=0.05)
    bench.out.write(b"x" * 200)
    waiting = await begun(bench.out.drained()) if is_awaited else None
    bench.out.write(b"x" * 50)
    async with asyncio.timeout(2):
        await bench.stalled.wait()
    assert bench.stalls == 1
    if waiting is not None:
        waiting.cancel()


async def test_outbound_watches_each_time_anew_that_it_is_full() -> None:
    """What was pushed in between past `write` is not counted; nothing is watched while there is room, and after `stop`."""
    bench = Bench(stall_s=0.1)
    for _ in range(10):
        bench.transport.write(b"x" * 200)  # as a push does
        await asyncio.sleep(0.03)
        bench.transport.take(200)
    await asyncio.sleep(0.15)
    assert bench.stalls == 0
    bench.out.write(b"x" * 200)
    bench.out.stop()
    await asyncio.sleep(0.15)
    assert bench.stalls == 0


async def test_outbound_does_not_report_a_client_that_takes_a_little() -> None:
    """One byte in each `stall_s` is progress."""
    bench = Bench(stall_s=0.05)
    bench.out.write(b"x" * 200)
    waiting = await begun(bench.out.drained())
    for _ in range(20):
        bench.transport.take(1)
        await asyncio.sleep(0.01)
    assert bench.stalls == 0
    waiting.cancel()


async def test_outbound_that_is_cut_ends_the_waiting() -> None:
    """The next wait raises."""
    bench = Bench()
    bench.out.abort()
    with pytest.raises(ConnectionResetError):
        await bench.out.drained()


async def test_streams_of_one_connection_write_one_after_another() -> None:
    """In the order in which they came, each when there is room."""
    bench = Bench()
    wrote: list[int] = []

    async def stream(number: int) -> None:
        await bench.out.turn()
        wrote.append(number)
        bench.out.write(b"x" * 150)

    bench.out.write(b"x" * 150)
    streams = [await begun(stream(number)) for number in range(3)]
    for number in range(3):
        assert wrote == list(range(number))
        bench.transport.take(150)
        await asyncio.wait_for(streams[number], 1)
    assert wrote == [0, 1, 2]


async def test_stream_that_gets_no_turn_for_long_is_starved_if_the_client_takes_bytes() -> None:
    """It is another stream that the client reads; a client that takes nothing at all is reported as stalled instead."""
    bench = Bench(stall_s=0.1)
    bench.out.write(b"x" * 200)
    first = await begun(bench.out.turn())
    second = await begun(bench.out.turn())
    bench.transport.take(1)
    async with asyncio.timeout(2):
        with pytest.raises(Starved):
            await second
    first.cancel()

    silent = Bench(stall_s=0.05)
    silent.out.write(b"x" * 200)
    first = await begun(silent.out.turn())
    second = await begun(silent.out.turn())
    async with asyncio.timeout(2):
        await silent.stalled.wait()
    await asyncio.sleep(0.06)  # longer than `stall_s`
    assert not second.done()
    second.cancel()
    first.cancel()
