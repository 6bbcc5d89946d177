"""File descriptors: each open stream is one, and a process that runs out of them fails where nobody looks for it.

Said at the start, not at the thousandth stream. The soft limit is a default for programs that use select(2), which we
do not; up to the hard limit a process may raise it by itself (setrlimit(2)).
"""

from __future__ import annotations

import structlog

try:
    import resource
except ImportError:  # not on Windows, which has no such limit
    resource = None  # type: ignore[assignment]

__all__ = ["RESERVE", "raise_nofile_limit"]

RESERVE = 256
"""Descriptors for all else: brokers, a producer per job partition, probes, streams that are being closed."""

log = structlog.get_logger()


def raise_nofile_limit(streams: int) -> bool:
    """Raise the process's limit so that so many streams may be open at once; if it cannot be, log what to do."""
    needed = streams + RESERVE
    if resource is None:
        return True
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if _holds(soft, needed):
        return True
    if _holds(hard, needed):
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
        return True
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    log.warning(
        "descriptors.too_few",
        allowed=hard,
        needed=needed,
        max_in_flight=streams,
        advice=f"raise the hard limit (ulimit -Hn) to {needed}, or lower worker.max_in_flight to {hard - RESERVE}",
    )
    return False


def _holds(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= needed
