"""The reader of an events topic and the auditor that checks a topic."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.model import Coordinates
from streamworker.reader import Auditor, EventReader, Notice, ResultAuditor


def event(type_: str, seq: int, attempt: str = "a", job_id: str = "j") -> dict[str, Any]:
    """Return an event with the common members."""
    return {
        "v": 1,
        "job_id": job_id,
        "attempt": attempt,
        "seq": seq,
        "type": type_,
        "ts": 0,
        "status": "completed",
    }


def attempt(name: str, deltas: int, *, ended: bool = True, job_id: str = "j") -> list[dict[str, Any]]:
    """Return the events of one attempt."""
    body = [event("delta", seq, name, job_id) for seq in range(1, deltas + 1)]
    end = [event("usage", deltas + 1, name, job_id)] if ended else []
    return [event("started", 0, name, job_id), *body, *end]


def notices(events: list[dict[str, Any]]) -> list[Notice]:
    """Read events; return the notices of each."""
    reader = EventReader()
    return [reading.notice for one in events for reading in reader.read(one)]


def test_reader_reports_a_whole_attempt_as_valid() -> None:
    """`started`, deltas and `usage` are valid."""
    assert notices(attempt("a", 2)) == [Notice.VALID] * 4


def test_reader_second_rejection_of_a_job_is_after_its_end() -> None:
    """Each rejection is an attempt without `started`; a second terminal event is still one too many."""
    rejections = [event("usage", 0, name) for name in ("a", "b")]

    assert notices(rejections) == [Notice.VALID, Notice.AFTER_END]
    assert notices([*attempt("x", 1), *rejections])[3:] == [Notice.AFTER_END] * 2
    assert notices([event("started", 0, "x"), rejections[0]])[1:] == [Notice.STALE]


def of_source(offset: int, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events with the source of their job record in `started`."""
    source = {"topic": "jobs", "partition": 0, "offset": offset}
    return [one | ({"source": source} if one["type"] == "started" else {}) for one in events]


@pytest.mark.parametrize("late", [event("delta", 1, "b"), event("usage", 2, "b")])
def test_reader_late_event_of_another_attempt_of_an_ended_job_is_stale(late: dict[str, Any]) -> None:
    """Only a second rejection is a second ending: it has no `started`."""
    assert notices([*attempt("a", 1), late])[-1] is Notice.STALE


@pytest.mark.parametrize("first", [event("usage", 1), event("delta", 0), event("delta", 1), event("news", 0)])
def test_reader_first_event_that_is_not_an_only_one_is_unopened(first: dict[str, Any]) -> None:
    """The end of a rejected job is its first event; anything else has a `started` before it."""
    assert notices([first]) == [Notice.UNOPENED]


def test_reader_repeated_started_changes_nothing() -> None:
    """A record that a producer has written twice; the events behind it are in their order."""
    first, *rest = attempt("a", 2)

    assert notices([first, rest[0], first, *rest[1:]]) == [
        Notice.VALID,
        Notice.VALID,
        Notice.DUPLICATE,
        Notice.VALID,
        Notice.VALID,
    ]


def test_reader_of_another_record_of_an_ended_job_reports_a_new_run() -> None:
    """The new run is followed from its `started`, and the job is open until it ends."""
    first, second = of_source(3, attempt("a", 1)), of_source(9, attempt("b", 1))
    reader = EventReader()
    for one in [*first, *second[:-1]]:
        readings = reader.read(one)
        if one is second[0]:
            assert [reading.notice for reading in readings] == [Notice.NEW_RUN, Notice.VALID]
    assert not reader.has_ended("j")
    reader.read(second[-1])

    assert reader.has_ended("j")


def test_reader_of_the_same_record_of_an_ended_job_reports_an_event_after_its_end() -> None:
    """A finished job must not run again after a redelivery."""
    first, second = of_source(3, attempt("a", 1)), of_source(3, attempt("b", 1))

    assert notices([*first, *second])[3] is Notice.AFTER_END


def test_reader_follows_the_latest_started() -> None:
    """A new attempt voids the former one, whose later events are stale."""
    events = [
        *attempt("a", 2, ended=False),
        event("started", 0, "b"),
        event("delta", 3, "a"),
        event("usage", 1, "b"),
    ]

    assert notices(events)[3:] == [Notice.SUPERSEDED, Notice.VALID, Notice.STALE, Notice.VALID]


def test_reader_reports_a_gap_once() -> None:
    """The event after the gap is valid, so that a frontend can show the rest."""
    events = [event("started", 0), event("delta", 2), event("usage", 3)]

    assert notices(events) == [Notice.VALID, Notice.GAP, Notice.VALID, Notice.VALID]


def test_reader_reports_a_repeated_event() -> None:
    """A seq below the next one was read before."""
    events = [
        event("started", 0),
        event("delta", 1),
        event("delta", 1),
        event("started", 0),
        event("usage", 2),
    ]

    expected = [Notice.VALID, Notice.VALID, Notice.DUPLICATE, Notice.DUPLICATE, Notice.VALID]
    assert notices(events) == expected


def test_reader_accepts_the_only_event_of_a_rejected_job() -> None:
    """A rejected job has no attempt, only a usage event with seq 0."""
    assert notices([event("usage", 0)]) == [Notice.VALID]


def test_reader_that_starts_late_reports_unopened_events() -> None:
    """A delta whose `started` was not read belongs to no known attempt."""
    assert notices([event("delta", 5)]) == [Notice.UNOPENED]


@pytest.mark.parametrize("late", [event("delta", 3), event("usage", 3), event("started", 0, "b")])
def test_reader_reports_events_after_the_end(late: dict[str, Any]) -> None:
    """No event may follow a terminal event."""
    assert Notice.AFTER_END in notices([*attempt("a", 1), late])


def test_reader_knows_open_and_ended_jobs() -> None:
    """For callers that wait for a job."""
    reader = EventReader()
    for one in [*attempt("a", 1, job_id="ended"), *attempt("a", 1, ended=False, job_id="open")]:
        reader.read(one)

    assert (list(reader.open_jobs), reader.has_ended("ended"), reader.has_ended("open")) == (
        ["open"],
        True,
        False,
    )


def test_reader_forgets_the_oldest_ended_jobs() -> None:
    """Memory is bounded for any number of jobs."""
    reader = EventReader(remembered=3)
    for number in range(10):
        for one in attempt("a", 0, job_id=str(number)):
            reader.read(one)

    assert [number for number in range(10) if reader.has_ended(str(number))] == [7, 8, 9]


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=6), st.randoms())
def test_reader_sees_the_last_attempt_whole_through_late_events_of_others(
    attempts: list[tuple[int, bool]], random: Any
) -> None:
    """Whatever fenced workers write in between, the valid events are those of the last attempt, in order."""
    stream: list[dict[str, Any]] = []
    zombies: list[dict[str, Any]] = []
    for number, (deltas, _) in enumerate(attempts):
        is_last = number == len(attempts) - 1
        own = attempt(f"a{number}", deltas, ended=is_last)
        merged = [own[0]]
        for one in own[1:]:
            while zombies and random.random() < 0.5:
                merged.append(zombies.pop(0))
            merged.append(one)
        stream += merged
        zombies += [event("delta", deltas + extra, f"a{number}") for extra in (1, 2)]
    reader = EventReader()
    last = f"a{len(attempts) - 1}"
    readings = [reading for one in stream for reading in reader.read(one)]
    valid = [
        reading.event
        for reading in readings
        if reading.notice is Notice.VALID and reading.event["attempt"] == last
    ]

    assert valid == attempt(last, attempts[-1][0])
    assert not any(reading.notice in {Notice.GAP, Notice.AFTER_END} for reading in readings)


def audit(events: list[tuple[dict[str, Any], int, bytes]]) -> list[str]:
    """Return the rules that events at (partition, key) break."""
    auditor = Auditor()
    found = []
    for offset, (one, partition, key) in enumerate(events):
        found += [breach.rule for breach in auditor.read(one, Coordinates("e", partition, offset), key)]
    return found + [breach.rule for breach in auditor.finish()]


def at_home(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], int, bytes]]:
    """Put events into partition 0 under their job's id."""
    return [(one, 0, one["job_id"].encode()) for one in events]


def test_auditor_finds_no_breach_in_valid_events() -> None:
    """A superseded attempt is not a breach."""
    assert audit(at_home([*attempt("a", 2, ended=False), *attempt("b", 3)])) == []


@pytest.mark.parametrize(
    ("events", "rule"),
    [
        ([event("started", 0), event("usage", 2)], "gap"),
        ([event("started", 0), event("delta", 1), event("delta", 1), event("usage", 2)], "repeated event"),
        ([*attempt("a", 1), event("usage", 3)], "after the terminal event"),
        ([*attempt("a", 1), *attempt("b", 1)], "after the terminal event"),
        ([event("delta", 4)], "no started"),
        ([event("started", 0)], "not ended"),
    ],
)
def test_auditor_names_the_broken_rule(events: list[dict[str, Any]], rule: str) -> None:
    """Each breach has a name."""
    assert rule in audit(at_home(events))


def test_auditor_of_a_job_with_two_runs_counts_the_last_ending() -> None:
    """A job that was submitted again breaks no rule."""
    first, second = of_source(3, attempt("a", 1)), of_source(9, attempt("b", 1))
    first[-1]["status"] = "failed"
    auditor = Auditor()
    breaches = [
        breach
        for offset, one in enumerate([*first, *second])
        for breach in auditor.read(one, Coordinates("e", 0, offset), b"j")
    ]

    assert breaches == []
    assert (auditor.jobs, auditor.reruns, auditor.statuses) == (1, 1, {"completed": 1})


def test_auditor_counts_what_it_has_read() -> None:
    """Events of void attempts are counted, and are not breaches; an ending counts only if it is valid."""
    late = event("delta", 1, "a")
    events = [*attempt("a", 1, ended=False), *attempt("b", 1), late, event("started", 0, "x", "k")]
    auditor = Auditor()
    assert not auditor.has_ended("j")
    for offset, one in enumerate(events):
        assert list(auditor.read(one, Coordinates("e", 0, offset), one["job_id"].encode())) == []

    assert (auditor.events, auditor.jobs, auditor.stale, auditor.superseded, auditor.reruns) == (
        7,
        2,
        1,
        1,
        0,
    )
    assert auditor.statuses == {"completed": 1}
    assert (auditor.has_ended("j"), auditor.has_ended("k")) == (True, False)
    assert [str(breach) for breach in auditor.finish()] == ["not ended: job k: no terminal event"]


def test_auditor_describes_each_breach() -> None:
    """What was read, and what was due."""
    auditor = Auditor()
    events = [event("started", 0), event("delta", 3), event("delta", 2), event("started", 0)]
    found = [
        breach.detail
        for offset, one in enumerate(events)
        for breach in auditor.read(one, Coordinates("e", 0, offset), b"j")
    ]

    assert found == ["seq 3 where 1 was due", "seq 2 was there already", Notice.DUPLICATE.value]


def test_auditor_reports_a_record_that_is_not_an_event() -> None:
    """Its job is not known."""
    breach = Auditor().unreadable(Coordinates("e", 2, 7), "truncated")

    assert str(breach) == "partition 2 offset 7: unreadable: job ?: truncated"


def test_auditor_passes_valid_endings_on_to_the_results_alone() -> None:
    """A result is due for these, and not for a late ending of a void attempt."""
    results = ResultAuditor()
    auditor = Auditor(results)
    void = event("usage", 1, "a")
    for offset, one in enumerate([event("started", 0, "a"), *attempt("b", 1), void]):
        list(auditor.read(one, Coordinates("e", 0, offset), b"j"))
    [valid] = [one for one in attempt("b", 1) if one["type"] == "usage"]

    assert list(results.read(result_of(valid), Coordinates("results", 0, 0), b"j")) == []
    assert list(results.finish()) == []


def test_auditor_finds_events_in_another_partition() -> None:
    """All events of a job are in one partition, under its id as key."""
    events = at_home(attempt("a", 1))
    events[1] = (events[1][0], 3, b"other")

    assert audit(events) == ["key", "partition"]


def test_auditor_reports_the_position() -> None:
    """A breach names partition and offset."""
    (breach,) = Auditor().read(event("delta", 1), Coordinates("e", 2, 7), b"j")

    assert str(breach).startswith("partition 2 offset 7: no started: job j")


# Results


def ending(job_id: str, attempt: str, ts: int = 5, **members: Any) -> dict[str, Any]:
    return {
        "type": "usage",
        "v": 1,
        "job_id": job_id,
        "attempt": attempt,
        "seq": 1,
        "ts": ts,
        "status": "completed",
    } | members


def result_of(terminal: dict[str, Any], **members: Any) -> dict[str, Any]:
    added: dict[str, Any] = {
        "type": "result",
        "model": "m",
        "upstream": None,
        "completion": {"id": "c"},
        "omitted": [],
    }
    return terminal | added | members


def audited(
    endings: list[dict[str, Any]], results: list[dict[str, Any]], erased: tuple[bytes, ...] = ()
) -> list[tuple[str, str]]:
    auditor = ResultAuditor()
    for event in endings:
        auditor.ended(event)
    breaches = [
        breach
        for offset, result in enumerate(results)
        for breach in auditor.read(result, Coordinates("results", 0, offset), result["job_id"].encode())
    ]
    for key in erased:
        auditor.erased(key)
    return [(breach.rule, breach.job_id) for breach in (*breaches, *auditor.finish())]


def test_result_auditor_with_one_equal_result_per_terminal_event_reports_nothing() -> None:
    """Of several runs the last terminal event counts; results of other topics' jobs are not judged."""
    first, last, other = ending("a", "1"), ending("a", "2"), ending("b", "3")
    assert audited([first, last], [result_of(first), result_of(last), result_of(other)]) == []


def test_result_auditor_reports_missing_repeated_and_unequal_results() -> None:
    """Each with its job."""
    a, b, c = (ending(job_id, "1") for job_id in "abc")
    found = audited([a, b, c], [result_of(a), result_of(a), result_of(b, status="failed")])
    assert found == [("repeated result", "a"), ("unequal result", "b"), ("no result", "c")]


def test_result_auditor_without_any_result_reports_every_job() -> None:
    """A worker without the setting must not go unnoticed."""
    assert audited([ending("a", "1")], []) == [("no result", "a")]


def test_result_auditor_does_not_judge_erased_results_and_jobs_before_the_first_one() -> None:
    """A tombstone deletes a result on purpose; before the first result, results were off."""
    old, erased, new = ending("a", "1", ts=1), ending("b", "1", ts=9), ending("c", "1", ts=5)
    assert audited([old, erased, new], [result_of(new)], erased=(b"b",)) == []


def test_result_auditor_counts_results_and_checks_their_keys() -> None:
    """The key is the job's id, as that of events is."""
    auditor, one = ResultAuditor(), ending("a", "1")
    auditor.ended(one)
    at = Coordinates("results", 0, 4)
    found = [str(breach) for key in (b"b", None) for breach in auditor.read(result_of(one), at, key)]

    assert auditor.results == 2
    assert found == [
        "partition 0 offset 4: key: job a: the key of the result is not the job's id",
        "partition 0 offset 4: key: job a: the key of the result is not the job's id",
        "partition 0 offset 4: repeated result: job a: another result of attempt 1",
    ]


def test_result_auditor_compares_members_in_any_order() -> None:
    """JSON objects have none."""
    one = ending("a", "1", usage={"x": 1, "y": 2})
    turned = dict(reversed(result_of(one, usage={"y": 2, "x": 1}).items()))

    assert audited([one], [turned]) == []


def test_result_auditor_judges_jobs_from_the_first_result_on_whatever_order_results_have() -> None:
    """Partitions are read one after another."""
    early, late, between = ending("a", "1", ts=5), ending("b", "1", ts=9), ending("c", "1", ts=7)
    at_first = ending("d", "1", ts=5)

    assert audited([early, late, between, at_first], [result_of(late), result_of(early)]) == [
        ("no result", "c"),
        ("no result", "d"),
    ]


def test_result_auditor_ignores_tombstones_of_unknown_jobs() -> None:
    """And those without a key."""
    auditor = ResultAuditor()
    auditor.ended(ending("a", "1"))
    for key in (None, b"", b"b", b"\xff"):
        auditor.erased(key)

    assert [breach.job_id for breach in auditor.finish()] == ["a"]
