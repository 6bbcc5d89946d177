"""The limit of open file descriptors. Each open stream needs one.

The limit is checked at the start, not when the thousandth stream fails. The low default of the soft limit protects
programs that use select(2), which this one does not; a process may raise it up to the hard limit (setrlimit(2)).
"""

from __future__ import annotations

import structlog

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

__all__ = ["RESERVE", "raise_nofile_limit"]

RESERVE = 256
"""Descriptors besides the streams: brokers, one producer per job partition, probes, streams that are closing."""

log = structlog.get_logger()


def raise_nofile_limit(streams: int) -> bool:
    """Raise the soft limit so that `streams` streams can be open at once; return whether it is high enough.

    If the hard limit is too low, a warning with the remedy is logged.
    """
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
