"""Idle connections by origin. No operation costs more when more connections are open or idle."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamworker.upstream.connection import Connection, Origin

__all__ = ["KEEPALIVE_S", "ConnectionPool"]

KEEPALIVE_S = 4.0
"""How long a connection may be idle. Common servers close idle connections after 5 s."""


class ConnectionPool:
    """The connections of a transport: those in use, and those that are idle, the most recently used one first.

    It has no limit: its user decides how many requests run at once.
    """

    def __init__(self, keepalive_s: float = KEEPALIVE_S) -> None:
        self._keepalive_s = keepalive_s
        self._open: set[Connection] = set()
        self._idle: dict[Origin, OrderedDict[Connection, float]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def open_count(self) -> int:
        """The number of open connections, idle ones included."""
        return len(self._open)

    @property
    def idle_count(self) -> int:
        """The number of idle connections."""
        return sum(map(len, self._idle.values()))

    def add(self, connection: Connection) -> None:
        """Track a new connection."""
        self._open.add(connection)
        if self._is_closed:
            connection.abort()

    def take(self, origin: Origin) -> Connection | None:
        """Return an idle connection that is still open, or None. A dead one closes all of its origin."""
        idle = self._idle.get(origin)
        if idle is None:
            return None
        connection, deadline = idle.popitem()
        if not idle:
            del self._idle[origin]
        if deadline > asyncio.get_running_loop().time() and connection.is_usable:
            return connection
        connection.abort()
        self.drop_idle(origin)
        return None

    def release(self, connection: Connection) -> None:
        """Keep a connection for the next request."""
        if self._is_closed:
            connection.abort()
            return
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._keepalive_s
        self._idle.setdefault(connection.origin, OrderedDict())[connection] = deadline
        if self._timer is None:
            self._timer = loop.call_at(deadline, self._drop_expired)

    def discard(self, connection: Connection) -> None:
        """Forget a closed connection."""
        self._open.discard(connection)
        idle = self._idle.get(connection.origin)
        if idle is not None and idle.pop(connection, None) is not None and not idle:
            del self._idle[connection.origin]

    def drop_idle(self, origin: Origin) -> None:
        """Close all idle connections of an origin."""
        for connection in self._idle.pop(origin, ()):
            connection.abort()

    def close(self) -> None:
        """Close every connection, and every one that is added or released later."""
        self._is_closed = True
        self._idle.clear()
        for connection in list(self._open):
            connection.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _drop_expired(self) -> None:
        """Close the connections whose time is over; schedule the next check."""
        self._timer = None
        loop = asyncio.get_running_loop()
        now = loop.time()
        oldest: list[float] = []
        for origin, idle in list(self._idle.items()):
            while idle:
                connection, deadline = next(iter(idle.items()))
                if deadline > now:
                    oldest.append(deadline)
                    break
                del idle[connection]
                connection.abort()
            if not idle:
                del self._idle[origin]
        if oldest:
            self._timer = loop.call_at(min(oldest), self._drop_expired)
