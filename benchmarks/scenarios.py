"""The scenarios that every contender runs."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlencode

__all__ = ["FULL", "QUICK", "Scenario"]


class Scenario(NamedTuple):
    """Paced: `streams` stay open; each receives `burst` deltas of `bytes` characters `rate` times a second.

    With a rate of 0: `streams` jobs of `deltas` deltas each, as fast as possible.
    """

    name: str
    streams: int
    rate: float = 0.0
    burst: int = 1
    bytes: int = 24
    deltas: int = 0

    @property
    def offered(self) -> float:
        """Deltas per second of all streams together; 0: as fast as possible."""
        return self.streams * self.rate * self.burst

    @property
    def model(self) -> str:
        """The model name that makes the upstream stream this scenario."""
        asked = {"rate": self.rate, "burst": self.burst, "bytes": self.bytes, "deltas": self.deltas}
        return "bench?" + urlencode({name: value for name, value in asked.items() if value})


def _paced(streams: int, rate: float) -> Scenario:
    return Scenario(f"{streams:,} streams × {rate:g}/s", streams, rate)


QUICK = (_paced(50, 10), Scenario("short jobs: 100 × 20", 100, deltas=20))

FULL = (
    _paced(50, 20),
    _paced(200, 20),
    _paced(300, 5),
    _paced(300, 20),
    _paced(1000, 5),
    _paced(1000, 20),
    _paced(2000, 2),
    Scenario("bursts: 100 streams × 20 at once", 100, 1.0, burst=20),
    Scenario("big deltas: 50 streams × 8 KiB × 10/s", 50, 10.0, bytes=8192),
    Scenario("short jobs: 2,000 × 20", 2000, deltas=20),
)
