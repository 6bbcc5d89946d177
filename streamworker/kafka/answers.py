"""Notice brokers that leave requests unanswered while their connections stay open, and log them.

A broker that hangs closes no connection, so a client learns of it only when a request's time limit is over, after 15
seconds or a minute. A broker answers the requests of one connection in their order, so the oldest one alone is judged:
those behind it may have to wait for it.

Times are in seconds of a monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import structlog

from streamworker.log_throttle import LogThrottle

__all__ = ["CHECK_S", "CONNECTION", "AnswerWatch", "PendingRequest", "SilentBrokers"]

CHECK_S = 0.25
"""How often a connection with open requests is checked."""

_PATIENCE_S = 2.0
"""How long a request may be overdue. With the half second for which a fetch may wait, and two checks, a broker that
hangs is reported within three seconds."""

_MAX_STEP_S = 2 * CHECK_S
"""What one check adds to a wait at most. A process that was stopped itself has not read the answers that are there."""

CONNECTION = "connection"
"""The name under which a connection that is being opened is reported."""

_HANGS = (
    "the connection is open and the broker does not answer: check whether its process hangs or is stopped, its log and "
    "its load, and the network; the request is repeated after its time limit"
)
_NOT_CONNECTED = (
    "the host does not complete the connection: check whether the broker's process hangs or is stopped, and whether a "
    "firewall drops packets; another attempt follows after the time limit"
)

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True, slots=True)
class PendingRequest:
    """The oldest unanswered request of a connection.

    `key` is its identity. `allowed_s` is how long the broker may hold it although it could answer: a fetch waits for
    records, and a join for the other members of the group (`inf`).
    """

    key: object
    name: str
    allowed_s: float = 0.0


class AnswerWatch:
    """Measure how long the oldest request of one connection has been unanswered."""

    __slots__ = ("_checked_at", "_key", "_progress", "waited_s")

    def __init__(self) -> None:
        self.waited_s = 0.0
        """For how long the request of the last check has been unanswered."""
        self._key: object = None
        self._checked_at = -inf
        self._progress = 0

    def is_overdue(self, now: float, request: PendingRequest | None, progress: int = 0) -> bool:
        """Check the connection; return whether its oldest request has been unanswered for too long.

        `progress` is the number of bytes that the connection has transferred. While it grows, a large request is being
        sent or a large response is being received, and the request is not overdue.
        """
        step_s = min(now - self._checked_at, _MAX_STEP_S)
        self._checked_at = now
        has_moved, self._progress = progress > self._progress, progress
        if request is None or request.key is not self._key or has_moved:
            self._key = None if request is None else request.key
            self.waited_s = 0.0
            return False
        self.waited_s += step_s
        return self.waited_s > request.allowed_s + _PATIENCE_S


class _Outage:
    """A broker that does not answer, and its overdue connections."""

    __slots__ = ("overdue", "since", "throttle")

    def __init__(self, since: float) -> None:
        self.since = since
        self.overdue: set[AnswerWatch] = set()
        self.throttle = LogThrottle()


class SilentBrokers:
    """Log brokers that do not answer: one line per broker and interval, and one when it answers again."""

    def __init__(self) -> None:
        self._outages: dict[str, _Outage] = {}

    def __bool__(self) -> bool:
        """Whether a broker did not answer, and has not answered since."""
        return bool(self._outages)

    def overdue(self, broker: str, watch: AnswerWatch, request: PendingRequest, now: float) -> None:
        """Note that a connection's oldest request is overdue. Called at every check."""
        outage = self._outages.get(broker)
        if outage is None:
            outage = self._outages[broker] = _Outage(now - watch.waited_s)
        outage.overdue.add(watch)
        if outage.throttle.failed(now) is not None:
            log.warning(
                "kafka.not_answering",
                broker=broker,
                request=request.name,
                waited_s=round(watch.waited_s, 1),
                reason=_NOT_CONNECTED if request.name == CONNECTION else _HANGS,
            )

    def answered(self, broker: str, watch: AnswerWatch, now: float) -> None:
        """Note an answer. It ends the outage, unless other connections to the broker wait still."""
        outage = self._outages.get(broker)
        if outage is None:
            return
        outage.overdue.discard(watch)
        if not outage.overdue:
            self._outages.pop(broker, None)  # blocking clients have a thread each
            log.info("kafka.answering", broker=broker, silent_s=round(now - outage.since, 1))

    def closed(self, broker: str, watch: AnswerWatch) -> None:
        """Forget a connection. The outage lasts until the broker answers on another one."""
        if (outage := self._outages.get(broker)) is not None:
            outage.overdue.discard(watch)
