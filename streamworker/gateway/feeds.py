"""What the gateway's handlers know of the events topic: a log that opens feeds, and a feed per client and job.

::

    FeedError
    ├── InvalidCursor       the text is not a cursor
    ├── CursorLost          what the cursor names is gone, and the job's `started` is gone too
    ├── JobNotFound         the search found no event, and reached its bounds
    ├── FeedLost            the log lost its end behind a delivered event; the client has to open a new feed
    └── BrokerUnavailable   no broker answered in time; retrying may help
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from streamworker.errors import StreamworkerError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from streamworker.gateway.frames import DeltaFraming

__all__ = [
    "START",
    "BrokerUnavailable",
    "CursorLost",
    "EventLog",
    "Feed",
    "FeedError",
    "FeedEvent",
    "FeedLost",
    "InvalidCursor",
    "JobNotFound",
    "JobSnapshot",
    "Push",
    "Replay",
    "Tally",
]

START = "start"
"""`Feed.resumed_from` of a feed that begins with the job's first event."""


class Replay(Enum):
    """What a feed delivers of the events that are in the log when it is opened."""

    EVENTS = "events"
    """All events of the valid attempt, or those behind the cursor."""

    SNAPSHOT = "snapshot"
    """One `snapshot` event in place of them. A job without events has no snapshot; its feed begins with `started`."""

    NONE = "none"
    """Nothing, but for the terminal event of a job that has ended."""


class FeedEvent(NamedTuple):
    """One event for a client."""

    kind: str
    """`started`, `delta`, `usage`, the name of a type of a later version, or `snapshot`, which the gateway makes."""

    cursor: str
    """Resumes behind this event. It ends in `.end` for `usage`."""

    value: bytes
    """The record's value, byte for byte, or the JSON text of the snapshot."""

    seq: int
    attempt: str


class Tally:
    """A number of events."""

    __slots__ = ("events",)

    def __init__(self) -> None:
        self.events = 0


class Push(NamedTuple):
    """How deltas are written to a client by the reader of the log: framed, counted, and passed to `write`, which must not block."""

    framing: DeltaFraming
    write: Callable[[bytes], object]
    delivered: Tally


class Feed(Protocol):
    """One job's events for one client. Only events of the valid attempt come; `usage` is committed, and the last one."""

    @property
    def job_id(self) -> str:
        """The job's id."""
        ...

    @property
    def resumed_from(self) -> str:
        """The cursor behind which delivery begins, or `START`."""
        ...

    @property
    def cursor(self) -> str:
        """The cursor of the last event that was taken; before the first one, a place from which to resume."""
        ...

    @property
    def is_live(self) -> bool:
        """Whether the replay is over. It becomes false again for a client that is slower than the job."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether `usage` was taken. No event follows it."""
        ...

    def take(self) -> FeedEvent | None:
        """Return the next event without waiting; None if there is none now, and behind `usage`."""
        ...

    async def next(self, push: Push | None = None) -> FeedEvent | None:
        """Wait for the next event and return it; None behind `usage`.

        With `push`, a delta that arrives during the wait is written by it, and the wait goes on: that saves a task switch
        per event. It goes on so until `hold` is called; then the next event is returned. Clients of one job get the same
        two objects for an event, so that it is framed once.

        The wait goes on through an outage of the broker. Only one caller may wait at a time. It may be cancelled, and
        no event is lost thereby.

        Raises:
            FeedLost: the log lost its end. Open a feed with `cursor`, which begins at the job's `started`.
            BrokerUnavailable: the log was stopped.
        """
        ...

    def hold(self) -> None:
        """Push no further delta in the present call of `next`: the client does not take it.

        Deltas of the same read of the log that were taken before are still written.
        """
        ...

    def place(self) -> str:
        """Return a fresh cursor that resumes where this feed is, for a `position` event: it skips what was searched.

        It is `cursor` if an event was taken.
        """
        ...

    @property
    def queued_bytes(self) -> int:
        """Size of the events that are queued for the client."""
        ...

    def share(self, limit_reached: Callable[[int], bool] | None) -> None:
        """Obey a limit that feeds share: `limit_reached(queued_bytes)` is called when an event is queued."""
        ...

    def close(self) -> None:
        """End the feed and release what it holds. Repeated calls do nothing."""
        ...


@dataclass(frozen=True, kw_only=True)
class JobSnapshot:
    """One job as far as its events are in the log."""

    job_id: str
    status: str
    """`waiting` (no event yet), `running`, or the status of the terminal event."""

    attempt: str | None
    attempts_seen: int
    model: str | None
    cursor: str
    choices: Sequence[Mapping[str, Any]]
    """`choice` (index), `message` and `finish_reason` each, as far as the message came."""

    ending: Mapping[str, Any] | None
    """The terminal event."""

    ending_value: bytes | None = None
    """The value of the terminal event's record, byte for byte."""

    @property
    def has_ended(self) -> bool:
        """Whether the job has a committed terminal event."""
        return self.ending is not None


class EventLog(Protocol):
    """The events topic for all clients of one process."""

    @property
    def is_ready(self) -> bool:
        """Whether the log is started and its readers run. An outage of the broker does not change it."""
        ...

    async def start(self) -> None:
        """Connect. Raises KafkaError, ConfigurationError."""
        ...

    async def stop(self) -> None:
        """Close the readers; `next` of each feed raises BrokerUnavailable. Bounded in time; never raises."""
        ...

    def partition(self, job_id: str) -> int:
        """Return the partition of the job's events."""
        ...

    def new_id(self, tenant: str = "") -> str:
        """Return a new job id. Its events are in one of the home partitions, if the gateway has any."""
        ...

    async def place(self, job_id: str) -> str:
        """Return a cursor from which the events of a job are read that is produced after this call.

        The partition's records are read from now on, so that the first event arrives without delay.
        Raises BrokerUnavailable.
        """
        ...

    async def open(
        self,
        job_id: str,
        *,
        cursor: str | None = None,
        since_ms: int | None = None,
        replay: Replay = Replay.EVENTS,
    ) -> Feed:
        """Open a feed. It returns when the place is known at which delivery begins.

        `since_ms` is a time, in ms since the epoch, after which the job was submitted. It is used without a cursor, and
        where the cursor's event is gone. The caller must close the feed.

        Raises:
            InvalidCursor, CursorLost, JobNotFound, BrokerUnavailable.
        """
        ...

    async def snapshot(
        self, job_id: str, *, cursor: str | None = None, since_ms: int | None = None, wait_s: float = 0.0
    ) -> JobSnapshot:
        """Return the job's state. With `wait_s`, wait at most so long for its terminal event. Raises as `open` does.

        `cursor` says where the job's events begin: the one that was returned when the job was submitted.
        """
        ...


class FeedError(StreamworkerError):
    """A feed cannot be opened, or cannot go on."""


class InvalidCursor(FeedError):
    """The text is not a cursor."""

    def __init__(self, text: str) -> None:
        super().__init__(
            f"{text[:80]!r} is not a valid cursor: pass the `id` of an event, or the `cursor` of a job, as it came"
        )


class CursorLost(FeedError):
    """The log does not hold the cursor's event any more, nor the job's `started`."""

    def __init__(self, job_id: str, cursor: str) -> None:
        self.job_id, self.cursor = job_id, cursor
        super().__init__(
            f"job {job_id}: the events behind cursor {cursor} are not in the log any more: its retention is over, or "
            "the topic was created anew"
        )


class JobNotFound(FeedError):
    """The search found no event of the job. `searched_from` is a time, in ms since the epoch."""

    def __init__(self, job_id: str, searched_from: int, advice: str) -> None:
        self.job_id, self.searched_from = job_id, searched_from
        super().__init__(f"job {job_id} was not found: {advice}")


class FeedLost(FeedError):
    """The log lost its end behind an event that was delivered. A feed that is opened with the cursor goes on."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id
        super().__init__(
            f"job {job_id}: the partition's log ends before an event that was delivered: connect again with the cursor"
        )


class BrokerUnavailable(FeedError):
    """No broker answered in time, or the log was stopped."""
