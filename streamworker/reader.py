"""The rules for readers of an events topic: which of its events are a job's valid ones.

Feed an `EventReader` the events of one topic, in order per partition. It follows the attempt that the latest
`started` event opened, returns that attempt's events, and reports events that are stale, repeated or missing.
The rules themselves are in docs/delivery.md; a reader in another language needs a few lines.
"""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from enum import Enum
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from streamworker.model import Coordinates

__all__ = ["Auditor", "Breach", "EventReader", "Notice", "Reading", "ResultAuditor"]


class Notice(Enum):
    """What a reader reports about an event."""

    VALID = "an event of the valid attempt"
    SUPERSEDED = "a new attempt begins; the events of the previous one are void"
    STALE = "an event of an attempt that is not the valid one: ignored"
    DUPLICATE = "an event that was there already: ignored"
    GAP = "events are missing before this one"
    UNOPENED = "an event of an attempt whose `started` was not seen"
    NEW_RUN = "a new run of a job that has ended: its record was submitted again"
    AFTER_END = "an event after the job's terminal event"


class Reading(NamedTuple):
    """One report about an event. `detail` is an explanation for people."""

    notice: Notice
    event: Mapping[str, Any]
    detail: str = ""


class EventReader:
    """Follows any number of jobs at once.

    It keeps the state of every open job, and of the newest `remembered` jobs that have ended, to recognise
    events that arrive after a job's end.
    """

    def __init__(self, *, remembered: int = 100_000) -> None:
        self._open: dict[str, _Job] = {}
        self._ended: OrderedDict[str, _Job] = OrderedDict()
        self._remembered = remembered

    @property
    def open_jobs(self) -> Iterator[str]:
        """Ids of the jobs that have started and not ended."""
        return iter(self._open)

    def has_ended(self, job_id: str) -> bool:
        """Whether the terminal event of the job's valid attempt was read."""
        return job_id in self._ended

    def read(self, event: Mapping[str, Any]) -> list[Reading]:
        """Read one event, an object with the common members; return the reports about it, at least one."""
        job_id = event["job_id"]
        job = self._open.get(job_id) or self._ended.get(job_id)
        if job is None:
            job = self._open[job_id] = _Job()
        readings = list(job.read(event))
        if job.is_ended:
            self._open.pop(job_id, None)
            self._ended[job_id] = job
            while len(self._ended) > self._remembered:
                self._ended.popitem(last=False)
        elif job_id in self._ended:
            self._open[job_id] = self._ended.pop(job_id)
        return readings


class _Job:
    __slots__ = ("attempt", "is_ended", "next_seq", "source")

    def __init__(self) -> None:
        self.attempt: str | None = None
        self.next_seq = 0
        self.is_ended = False
        self.source: Any = None  # of the job record, in the last `started`

    def read(self, event: Mapping[str, Any]) -> Iterator[Reading]:
        if event["type"] == "started":
            yield from self._open(event)
        elif self.attempt is None:
            yield from self._unopened(event)
        elif event["attempt"] != self.attempt and self.is_ended and _is_lone(event):
            yield Reading(Notice.AFTER_END, event, "another terminal event of a job that has ended")
        elif event["attempt"] != self.attempt:
            yield Reading(Notice.STALE, event, f"attempt {event['attempt']}, the valid one is {self.attempt}")
        else:
            yield from self._in_order(event)

    def _open(self, event: Mapping[str, Any]) -> Iterator[Reading]:
        if event["attempt"] == self.attempt:
            yield Reading(Notice.DUPLICATE, event)
            return
        source = event.get("source")
        if self.is_ended and (source is None or source == self.source):
            yield Reading(Notice.AFTER_END, event, "a new attempt at a job that has ended")
        elif self.is_ended:
            yield Reading(Notice.NEW_RUN, event)
        elif self.attempt is not None:
            yield Reading(
                Notice.SUPERSEDED, event, f"attempt {self.attempt} is void after {self.next_seq} events"
            )
        self.attempt, self.next_seq, self.is_ended, self.source = event["attempt"], 0, False, source
        yield from self._in_order(event)

    def _unopened(self, event: Mapping[str, Any]) -> Iterator[Reading]:
        """Read an event of a job whose `started` was not read. Only a rejected job has none."""
        if _is_lone(event):
            self.attempt = event["attempt"]
            yield from self._in_order(event)
        else:
            yield Reading(Notice.UNOPENED, event)

    def _in_order(self, event: Mapping[str, Any]) -> Iterator[Reading]:
        seq = event["seq"]
        if seq < self.next_seq:
            yield Reading(Notice.DUPLICATE, event, f"seq {seq} was there already")
            return
        if self.is_ended:
            yield Reading(Notice.AFTER_END, event, f"seq {seq} after the terminal event")
            return
        if seq > self.next_seq:
            yield Reading(Notice.GAP, event, f"seq {seq} where {self.next_seq} was due")
        self.next_seq = seq + 1
        self.is_ended = event["type"] == "usage"
        yield Reading(Notice.VALID, event)


def _is_lone(event: Mapping[str, Any]) -> bool:
    """Whether this is the only event of its attempt: the terminal event of a rejected job."""
    return bool(event["type"] == "usage" and event["seq"] == 0)


class Breach(NamedTuple):
    """A rule that a record of the events topic breaks."""

    rule: str
    at: Coordinates | None
    job_id: str
    detail: str

    def __str__(self) -> str:
        place = f"partition {self.at.partition} offset {self.at.offset}: " if self.at is not None else ""
        return f"{place}{self.rule}: job {self.job_id}: {self.detail}"


_BREACHES = {
    Notice.GAP: "gap",
    Notice.DUPLICATE: "repeated event",
    Notice.UNOPENED: "no started",
    Notice.AFTER_END: "after the terminal event",
}


class Auditor:
    """Checks a whole events topic against the rules. Call `read` with every record, in order per partition,
    then `finish`."""

    def __init__(self, results: ResultAuditor | None = None) -> None:
        """Create an auditor; it passes the terminal events of valid attempts on to `results`."""
        self._results = results
        self._reader = EventReader(remembered=1 << 62)
        self._partition: dict[str, int] = {}
        self.events = 0
        self.stale = 0
        self.superseded = 0
        self.reruns = 0
        self._status: dict[str, str] = {}

    def read(self, event: Mapping[str, Any], at: Coordinates, key: bytes | None) -> Iterator[Breach]:
        """Check one event; yield the rules that it breaks."""
        self.events += 1
        job_id = event["job_id"]
        if key != job_id.encode():
            yield Breach("key", at, job_id, "the record's key is not the job's id")
        home = self._partition.setdefault(job_id, at.partition)
        if home != at.partition:
            yield Breach("partition", at, job_id, f"other events of the job are in partition {home}")
        for reading in self._reader.read(event):
            if rule := _BREACHES.get(reading.notice):
                yield Breach(rule, at, job_id, reading.detail or reading.notice.value)
            self._count(reading)

    def unreadable(self, at: Coordinates, reason: str) -> Breach:
        """Return the breach for a record that is not an event."""
        return Breach("unreadable", at, "?", reason)

    def finish(self) -> Iterator[Breach]:
        """Yield a breach per job that has started and not ended. While workers run, such jobs are expected."""
        for job_id in self._reader.open_jobs:
            yield Breach("not ended", None, job_id, "no terminal event")

    @property
    def jobs(self) -> int:
        """Number of jobs that were read."""
        return len(self._partition)

    @property
    def statuses(self) -> Counter[str]:
        """Number of ended jobs per status. Of a job with several runs, the last terminal event counts."""
        return Counter(self._status.values())

    def has_ended(self, job_id: str) -> bool:
        """Whether the terminal event of the job's valid attempt was read."""
        return self._reader.has_ended(job_id)

    def _count(self, reading: Reading) -> None:
        if reading.notice is Notice.STALE:
            self.stale += 1
        elif reading.notice is Notice.SUPERSEDED:
            self.superseded += 1
        elif reading.notice is Notice.NEW_RUN:
            self.reruns += 1
        elif reading.notice is Notice.VALID and reading.event["type"] == "usage":
            self._status[reading.event["job_id"]] = str(reading.event.get("status"))
            if self._results is not None:
                self._results.ended(reading.event)


_OF_RESULTS = frozenset({"type", "model", "upstream", "source", "events", "completion", "omitted"})
"""Members of a result that the terminal event does not have, or has with another value."""


class _Ending:
    __slots__ = ("attempt", "digest", "is_answered", "ts")

    def __init__(self, event: Mapping[str, Any]) -> None:
        self.attempt, self.ts = event["attempt"], event["ts"]
        self.digest = _digest(event)
        self.is_answered = False


class ResultAuditor:
    """Compares a results topic with the terminal events: the last one of each job has one result with equal members.

    Call `read` or `erased` with every record of the results topic after all events were read, then `finish`.
    """

    def __init__(self) -> None:
        self.results = 0
        self._endings: dict[str, _Ending] = {}
        self._first_ts: int | None = None

    def ended(self, event: Mapping[str, Any]) -> None:
        """Take a terminal event. It replaces that of an earlier run of the job."""
        self._endings[event["job_id"]] = _Ending(event)

    def read(self, result: Mapping[str, Any], at: Coordinates, key: bytes | None) -> Iterator[Breach]:
        """Check one result; yield the rules that it breaks. Results of other runs than the last one are ignored."""
        self.results += 1
        job_id, ts = result["job_id"], result["ts"]
        self._first_ts = ts if self._first_ts is None else min(self._first_ts, ts)
        if key != job_id.encode():
            yield Breach("key", at, job_id, "the key of the result is not the job's id")
        ending = self._endings.get(job_id)
        if ending is None or ending.attempt != result["attempt"]:
            return
        if ending.is_answered:
            yield Breach("repeated result", at, job_id, f"another result of attempt {ending.attempt}")
        elif ending.digest != _digest(result):
            yield Breach("unequal result", at, job_id, "its members differ from those of the terminal event")
        ending.is_answered = True

    def erased(self, key: bytes | None) -> None:
        """Take a record without a value: the job's result was deleted on purpose."""
        if (ending := self._endings.get((key or b"").decode("utf-8", "replace"))) is not None:
            ending.is_answered = True

    def finish(self) -> Iterator[Breach]:
        """Yield a breach per job without a result.

        Jobs that ended before the first result that was read are left out: results were off then, or are deleted.
        """
        for job_id, ending in self._endings.items():
            if not ending.is_answered and (self._first_ts is None or ending.ts >= self._first_ts):
                yield Breach(
                    "no result", None, job_id, "a terminal event, and no record in the results topic"
                )


def _digest(record: Mapping[str, Any]) -> bytes:
    members = {name: value for name, value in record.items() if name not in _OF_RESULTS}
    return blake2b(json.dumps(members, sort_keys=True).encode(), digest_size=16).digest()
