"""Which jobs `retry` selects, and the records that it writes."""

from __future__ import annotations

import json
import time
from typing import Any

import click
import pytest

from streamworker.cli.retry import _new_value, _Selection
from streamworker.cli.shared import parse_since
from streamworker.errors import StreamworkerError
from streamworker.model import ConsumerRecord, Coordinates

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def started(job_id: str, offset: int = 0) -> dict[str, Any]:
    source = {"topic": "jobs", "partition": 1, "offset": offset}
    return {"job_id": job_id, "type": "started", "ts": 0, "source": source}


def usage(job_id: str, status: str, code: str | None = None, ts: int = 1000) -> dict[str, Any]:
    error = None if code is None else {"code": code}
    return {"job_id": job_id, "type": "usage", "ts": ts, "status": status, "error": error}


def selected(events: list[dict[str, Any]], **over: Any) -> dict[str, Coordinates | None]:
    arguments: dict[str, Any] = {
        "statuses": frozenset(),
        "codes": frozenset(),
        "since_ms": 0,
        "max_jobs": 10,
    } | over
    selection = _Selection(**arguments)
    for event in events:
        selection.read(event)
    return selection.sources


def test_selection_by_status_and_code_needs_both() -> None:
    """Options of different kinds restrict the selection, options of one kind extend it."""
    events = [
        *(started("a", 1), usage("a", "failed", "auth")),
        *(started("b", 2), usage("b", "failed", "quota")),
        *(started("c", 3), usage("c", "interrupted", "auth")),
        *(started("d", 4), usage("d", "completed")),
    ]

    assert list(selected(events, statuses=frozenset({"failed"}))) == ["a", "b"]
    assert list(selected(events, codes=frozenset({"auth"}))) == ["a", "c"]
    assert selected(events, statuses=frozenset({"failed"}), codes=frozenset({"auth", "x"})) == {
        "a": Coordinates("jobs", 1, 1)
    }


@pytest.mark.parametrize(
    "later", [[started("a", 7)], [started("a", 7), usage("a", "completed")], [usage("a", "cancelled")]]
)
def test_selection_of_a_job_whose_last_run_is_open_or_ended_otherwise_is_empty(
    later: list[dict[str, Any]],
) -> None:
    """The last run of a job counts."""
    events = [started("a"), usage("a", "failed", "auth"), *later]

    assert selected(events, statuses=frozenset({"failed"})) == {}


def test_selection_since_a_time_compares_the_terminal_event() -> None:
    """A job that ended before the time is not selected."""
    events = [started("a"), usage("a", "failed", ts=999), started("b"), usage("b", "failed", ts=1000)]

    assert list(selected(events, statuses=frozenset({"failed"}), since_ms=1000)) == ["b"]


def test_selection_of_a_rejected_job_has_no_source() -> None:
    """A rejected job has no `started` event."""
    assert selected([usage("a", "rejected", "invalid_job")], codes=frozenset({"invalid_job"})) == {"a": None}


def test_selection_of_too_many_jobs_raises() -> None:
    """The memory of the command is bounded, and nothing is written."""
    events = [one for n in range(11) for one in (started(f"j{n}"), usage(f"j{n}", "failed"))]

    with pytest.raises(StreamworkerError, match="more than 10 jobs are selected, and none was submitted"):
        selected(events, statuses=frozenset({"failed"}))


@pytest.mark.parametrize(("text", "age_s"), [("90m", 5400), ("2h", 7200), ("3d", 259_200), ("5s", 5)])
def test_since_as_a_duration_is_relative_to_now(text: str, age_s: int) -> None:
    """Seconds, minutes, hours and days are accepted."""
    value = parse_since(click.Context(click.Command("x")), click.Option(["--since"]), text)

    assert value == pytest.approx((time.time() - age_s) * 1000, abs=2000)


def test_since_as_rfc_3339_is_absolute() -> None:
    """A time needs a zone."""
    context, option = click.Context(click.Command("x")), click.Option(["--since"])

    assert parse_since(context, option, "1970-01-01T00:01:00Z") == 60_000
    for text in ("yesterday", "1970-01-01T00:01:00", "2 h"):
        with pytest.raises(click.BadParameter, match="is not a valid time"):
            parse_since(context, option, text)


def record(value: bytes | None) -> ConsumerRecord:
    return ConsumerRecord(Coordinates("jobs", 1, 7), 0, None, value)


def test_new_value_of_a_job_with_an_id_is_unchanged() -> None:
    """The record is submitted byte for byte."""
    value = json.dumps({"job_id": "a", "request": REQUEST}).encode()

    assert _new_value(record(value), "a", 1 << 20) == (value, None)


def test_new_value_of_a_job_without_an_id_has_its_id_as_a_member() -> None:
    """The id was derived from the coordinates of the record, and the new record has other ones."""
    value = b' {"request": ' + json.dumps(REQUEST).encode() + b"}"
    new, reason = _new_value(record(value), "jobs-1-7", 1 << 20)

    assert reason is None
    assert json.loads(new) == {"job_id": "jobs-1-7", "request": REQUEST}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "has no value"),
        (b"noise", "is another one now"),
        (json.dumps({"job_id": "b", "request": REQUEST}).encode(), "is another one now"),
        (
            json.dumps({"job_id": "a", "request": REQUEST, "deadline": "2020-01-01T00:00:00Z"}).encode(),
            "its deadline has passed",
        ),
    ],
)
def test_new_value_of_a_job_that_cannot_run_again_has_a_reason(value: bytes | None, reason: str) -> None:
    """The job is skipped with a message."""
    _, found = _new_value(record(value), "a", 1 << 20)

    assert found is not None
    assert reason in found
