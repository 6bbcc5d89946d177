"""Limits per caller: open streams and requests per minute. At a limit new ones are refused; open streams stay."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from math import ceil
from time import monotonic
from typing import TYPE_CHECKING

from streamworker.gateway.errors import ApiError
from streamworker.gateway.feeds import Tally

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from streamworker.gateway.auth import Caller

__all__ = ["FACES", "MAX_CONNECTIONS", "Limits"]

MAX_CONNECTIONS = 10_000

FACES = ("sse", "ndjson", "json", "chat", "websocket")
"""The ways in which events reach clients; names of streams in metrics."""

_MINUTE = 60.0
_ROUNDING = 1e-9


class Limits:
    """Counts streams and requests of each caller. It holds nothing of callers that have neither."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._streams: dict[str, int] = {}
        self.open: Counter[str] = Counter()
        """Open streams by their face."""
        self.delivered: dict[str, Tally] = {face: Tally() for face in FACES}
        """Events written since the last scrape, by face."""
        self._allowances: dict[
            str, tuple[float, float]
        ] = {}  # of keys only: their number is that of the file

    @property
    def streams(self) -> int:
        """Streams that are open."""
        return sum(self._streams.values())

    def admit(self, caller: Caller) -> None:
        """Count a request. Raises ApiError 429 where the caller's allowance for a minute is spent.

        The allowance is full after a quiet minute, and grows by a sixtieth each second.
        """
        limit = caller.requests_per_minute
        if limit is None:
            return
        now = self._clock()
        left, since = self._allowances.get(caller.account, (float(limit), now))
        left = min(float(limit), left + (now - since) * limit / _MINUTE)
        if left < 1 - _ROUNDING:
            wait_s = max(1, ceil((1 - left) * _MINUTE / limit))  # sooner it would be refused again
            self._allowances[caller.account] = (left, now)
            raise ApiError(
                429,
                "too_many_requests",
                f"the key may make {limit} requests per minute",
                headers={"Retry-After": str(wait_s)},
            )
        self._allowances[caller.account] = (left - 1, now)

    @contextmanager
    def stream(self, caller: Caller, face: str) -> Iterator[None]:
        """Count a stream while the block runs. Raises ApiError 429 where the caller has too many."""
        self.enter(caller, face)
        try:
            yield
        finally:
            self.leave(caller, face)

    def enter(self, caller: Caller, face: str) -> None:
        """Count a stream until `leave` is called. Raises ApiError 429 where the caller has too many."""
        account = caller.account
        if self._streams.get(account, 0) >= caller.max_streams:
            raise ApiError(
                429,
                "too_many_streams",
                f"the credential may have {caller.max_streams} streams open at once",
            )
        self._streams[account] = self._streams.get(account, 0) + 1
        self.open[face] += 1

    def leave(self, caller: Caller, face: str) -> None:
        """Undo one `enter`."""
        account = caller.account
        self.open[face] -= 1
        self._streams[account] -= 1
        if not self._streams[account]:
            del self._streams[account]
