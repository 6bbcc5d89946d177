"""Idle connections: which one is used again, and when they are closed. The clock is virtual."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamworker.upstream.connection import Origin
from streamworker.upstream.pool import KEEPALIVE_S, ConnectionPool
from tests.turnable import run

ORIGIN = Origin("http", "one", 80, "one")
OTHER = Origin("http", "two", 80, "two")


class Connection:
    """A connection that reports its end to the pool, as the real one does."""

    def __init__(self, pool: Any, origin: Origin = ORIGIN) -> None:
        self.pool = pool
        self.origin = origin
        self.is_usable = True
        self.aborts = 0
        self.pool.add(self)

    def abort(self) -> None:
        self.aborts += 1
        self.is_usable = False
        self.pool.discard(self)


def idle(pool: ConnectionPool, *origins: Origin) -> list[Any]:
    """Add a connection to each origin, and release it."""
    connections = [Connection(pool, origin) for origin in origins]
    for connection in connections:
        pool.release(connection)  # type: ignore[arg-type]  # what the pool uses of it
    return connections


async def test_connection_that_was_used_last_is_used_next() -> None:
    """The others expire, when fewer are needed than before."""
    pool = ConnectionPool()
    first, second = idle(pool, ORIGIN, ORIGIN)
    assert [pool.take(ORIGIN) for _ in range(3)] == [second, first, None]
    assert (pool.open_count, pool.idle_count) == (2, 0)
    pool.close()


async def test_connection_is_used_for_its_origin_only() -> None:
    """The name in the TLS handshake is part of an origin."""
    pool = ConnectionPool()
    [one] = idle(pool, ORIGIN)
    assert pool.take(OTHER) is None
    assert pool.take(ORIGIN._replace(server_name="alias")) is None
    assert pool.take(ORIGIN) is one
    pool.close()


@pytest.mark.parametrize(
    ("wait_s", "is_used"), [(0.0, True), (KEEPALIVE_S - 0.01, True), (KEEPALIVE_S, False), (60.0, False)]
)
async def test_connection_is_used_within_its_time(wait_s: float, *, is_used: bool) -> None:
    """Servers close after five seconds: a request on a connection that is being closed would fail."""
    pool = ConnectionPool()
    [one] = idle(pool, ORIGIN)
    await asyncio.sleep(wait_s)
    assert (pool.take(ORIGIN) is one) == is_used
    assert one.aborts == (not is_used)
    pool.close()


async def test_idle_connections_are_closed_without_a_request() -> None:
    """Each at its own time, by one timer for all origins."""
    faults: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda *fault: faults.append(fault))
    pool = ConnectionPool(10.0)
    [first] = idle(pool, ORIGIN)
    await asyncio.sleep(4)
    [second] = idle(pool, OTHER)
    await asyncio.sleep(3)
    [third] = idle(pool, ORIGIN)
    await asyncio.sleep(3.1)
    assert [one.aborts for one in (first, second, third)] == [1, 0, 0]
    await asyncio.sleep(4)
    assert [one.aborts for one in (first, second, third)] == [1, 1, 0]
    await asyncio.sleep(3)
    assert (third.aborts, pool.open_count, pool.idle_count, faults) == (1, 0, 0, [])


async def test_dead_connection_closes_the_idle_ones_of_its_origin() -> None:
    """The server was restarted, or a NAT has forgotten them: each would cost a failed request."""
    pool = ConnectionPool()
    first, second, other = idle(pool, ORIGIN, ORIGIN, OTHER)
    second.is_usable = False
    assert pool.take(ORIGIN) is None
    assert [one.aborts > 0 for one in (first, second, other)] == [True, True, False]
    assert pool.take(OTHER) is other
    pool.close()


async def test_connection_that_closes_itself_is_not_used() -> None:
    """It leaves the pool, whether it is idle or not; twice is harmless."""
    pool = ConnectionPool()
    [one] = idle(pool, ORIGIN)
    busy = Connection(pool)
    for connection in (one, busy, busy):
        pool.discard(connection)  # type: ignore[arg-type]  # what the pool uses of it
    assert (pool.take(ORIGIN), pool.open_count, pool.idle_count) == (None, 0, 0)


async def test_closed_pool_keeps_nothing() -> None:
    """Connections in use too; one that is opened or released later is closed at once."""
    pool = ConnectionPool()
    [one] = idle(pool, ORIGIN)
    busy = Connection(pool)
    pool.close()
    late = Connection(pool)
    assert not late.is_usable
    pool.release(late)  # type: ignore[arg-type]  # what the pool uses of it
    assert [connection.is_usable for connection in (one, busy, late)] == [False] * 3
    assert (pool.take(ORIGIN), pool.open_count, pool.idle_count) == (None, 0, 0)
    await asyncio.sleep(60)


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["open", "take", "release", "die", "wait"]),
            st.sampled_from([ORIGIN, OTHER]),
            st.floats(0, 5),
        ),
        max_size=40,
    )
)
def test_pool_returns_open_connections_of_the_origin_within_their_time(
    steps: list[tuple[str, Origin, float]],
) -> None:
    """And knows of every connection that is open, whatever the order of events."""

    async def work() -> None:
        loop, pool = asyncio.get_running_loop(), ConnectionPool()
        busy: list[Any] = []
        released: dict[Any, float] = {}
        for step, origin, seconds in steps:
            if step == "open":
                busy.append(Connection(pool, origin))
            elif step == "release" and busy:
                connection = busy.pop()
                released[connection] = loop.time()
                pool.release(connection)
            elif step == "die" and released:
                next(iter(released)).abort()
            elif step == "wait":
                await asyncio.sleep(seconds)
            elif step == "take" and (taken := pool.take(origin)) is not None:
                connection = taken
                assert connection.origin == origin
                assert connection.is_usable
                assert loop.time() < released.pop(connection) + KEEPALIVE_S
                busy.append(connection)
            released = {one: at for one, at in released.items() if one.is_usable}
            assert pool.idle_count == len(released)
            assert pool.open_count == len(released) + len(busy)
        pool.close()

    run(work())
