"""An independent check of an events topic against the rules of docs/delivery.md.

It shares no code with `streamworker.reader`: an error in one of them is not repeated in the other.
"""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

from streamworker.practice import expected_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

__all__ = ["Breach", "EventRecord", "JobRecord", "breaches", "events_of", "text_of", "unfinished_below"]


class JobRecord(NamedTuple):
    """A job record with its coordinates, and the parts of the request that determine the answer."""

    topic: str
    partition: int
    offset: int
    job_id: str
    model: str | None
    messages: Sequence[Any]


class EventRecord(NamedTuple):
    """An event record as a reader sees it."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    headers: Sequence[tuple[str, bytes]]
    event: dict[str, Any]


class Breach(NamedTuple):
    """A guarantee that was broken."""

    kind: str
    job_id: str
    detail: str


def breaches(jobs: Iterable[JobRecord], records: Iterable[EventRecord]) -> list[Breach]:
    """Return the breaches that a read_committed reader sees when all jobs should have ended."""
    by_job = defaultdict(list)
    for record in records:
        by_job[record.event["job_id"]].append(record)
    wanted = {job.job_id: job for job in jobs}
    found = [Breach("lost job", job_id, "no event at all") for job_id in wanted.keys() - by_job.keys()]
    for job_id, seen in by_job.items():
        found += [Breach(kind, job_id, detail) for kind, detail in _of_job(wanted.get(job_id), seen)]
    return found


def events_of(job_id: str, records: Iterable[EventRecord]) -> list[dict[str, Any]]:
    """Return the events of the valid attempt. `records` are in the order of their partition."""
    seen = [record.event for record in records if record.event["job_id"] == job_id]
    opened = [event["attempt"] for event in seen if event["type"] == "started"]
    valid = opened[-1] if opened else seen[-1]["attempt"] if seen else None
    return [event for event in seen if event["attempt"] == valid]


def text_of(events: Iterable[Mapping[str, Any]], choice: int = 0) -> str:
    """Return the text of one choice."""
    deltas = (event for event in events if event["type"] == "delta" and event["choice"] == choice)
    return "".join(event["delta"].get("content") or "" for event in deltas)


def unfinished_below(
    committed: int, topic: str, partition: int, jobs: Iterable[JobRecord], records: Iterable[EventRecord]
) -> list[Breach]:
    """Return the jobs below a committed offset that have no terminal event."""
    ended = {record.event["job_id"] for record in records if record.event["type"] == "usage"}
    passed = [
        job for job in jobs if (job.topic, job.partition) == (topic, partition) and job.offset < committed
    ]
    return [
        Breach("offset past an unfinished job", job.job_id, f"{job.offset} < {committed}")
        for job in passed
        if job.job_id not in ended
    ]


def _of_job(job: JobRecord | None, seen: Sequence[EventRecord]) -> Iterable[tuple[str, str]]:
    places = {(record.topic, record.partition) for record in seen}
    if len(places) > 1:
        yield "events in more than one partition", str(sorted(places))
    if {record.key for record in seen} != {seen[0].event["job_id"].encode()}:
        yield "events under another key", str({record.key for record in seen})
    events = [record.event for record in seen]
    terminals = [place for place, event in enumerate(events) if event["type"] == "usage"]
    if not terminals:
        yield "lost job", f"{len(events)} events and no terminal one"
    if len(terminals) > 1:
        yield "second terminal", str([events[place]["attempt"] for place in terminals])
    openings = [place for place, event in enumerate(events) if event["type"] == "started"]
    if terminals and openings and openings[-1] > terminals[0]:
        yield "finished job run again", f"started at {openings[-1]}, had ended at {terminals[0]}"
    valid = events_of(events[0]["job_id"], seen)
    yield from _of_attempt(job, valid)


def _of_attempt(job: JobRecord | None, valid: Sequence[dict[str, Any]]) -> Iterable[tuple[str, str]]:
    numbers = [event["seq"] for event in valid]
    if numbers != list(range(len(valid))):
        kind = "seq repeated" if len(set(numbers)) < len(numbers) else "gap"
        yield kind, _short(numbers)
    ends = [place for place, event in enumerate(valid) if event["type"] == "usage"]
    if ends and ends[0] != len(valid) - 1:
        yield "terminal is not last", f"{len(valid) - 1 - ends[0]} events after it"
    if not ends:
        yield "terminal of another attempt", valid[0]["attempt"] if valid else "none"
        return
    end = valid[ends[0]]
    if end["seq"] != ends[0]:
        yield "terminal does not count", f"seq {end['seq']} after {ends[0]} events"
    deltas = sum(event["type"] == "delta" and event["choice"] is not None for event in valid)
    if end["observed"]["deltas"] != deltas:
        yield "observed deltas", f"{end['observed']['deltas']} reported, {deltas} published"
    if job is not None and job.model is not None:
        yield from _of_content(job, valid, end)


def _of_content(
    job: JobRecord, valid: Sequence[dict[str, Any]], end: Mapping[str, Any]
) -> Iterable[tuple[str, str]]:
    assert job.model is not None
    for choice, expected in enumerate(expected_text(job.model, job.messages)):
        got = text_of(valid, choice)
        whole = end["status"] == "completed"
        if (got != expected) if whole else not expected.startswith(got):
            yield "content differs", f"choice {choice}: {json.dumps(got)[-80:]}"


def _short(numbers: Sequence[int]) -> str:
    wrong = next((place for place, number in enumerate(numbers) if number != place), len(numbers))
    return f"at {wrong}: {list(numbers[max(0, wrong - 2) : wrong + 3])} of {len(numbers)}"
