"""The attempt: its transitions as a table, its events in order, its usage at the end."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from streamworker.model import (
    DeltaEvent,
    ErrorCode,
    JobError,
    Observed,
    Source,
    Started,
    Status,
    Timing,
    UsageSource,
    Voided,
)
from streamworker.redaction import Redactor
from streamworker.stream.attempt import TRANSITIONS, Attempt, Input, InvalidTransition, State, Transition
from streamworker.stream.coalesce import Coalescer
from streamworker.stream.usage import VoidedUsage
from tests.streams import NOW, chunk, data, ended, listening, make_attempt, make_job, play

ERROR = JobError(ErrorCode.TIMEOUT_IDLE, "nothing came")
TEXT = data(chunk({"content": "a"}), chunk({"content": "b"}, "stop"))


def in_state(state: State) -> Attempt:
    """Return an attempt that was brought to a state by the fewest inputs."""
    attempt = make_attempt()
    attempt.started()
    if state is State.ENDED:
        attempt.cancel("")
    if state in {State.CALLING, State.LISTENING, State.STREAMING, State.TRY_FAILED, State.WINDING_UP}:
        attempt.call()
    if state is State.TRY_FAILED:
        attempt.fail(ERROR)
    if state in {State.LISTENING, State.STREAMING, State.WINDING_UP}:
        attempt.answer()
    if state in {State.STREAMING, State.WINDING_UP}:
        assert len(list(attempt.receive(data(chunk({"content": "a"})), NOW))) == 1
    if state is State.WINDING_UP:
        attempt.wind_up("enough")
    assert attempt.state is state
    return attempt


def apply(attempt: Attempt, input_: Input) -> None:  # noqa: C901 - one row each
    match input_:
        case Input.CALL:
            attempt.call()
        case Input.ANSWER:
            attempt.answer()
        case Input.DELTA:
            list(attempt.receive(data(chunk({"content": "a"})), NOW))
        case Input.DONE:
            list(attempt.receive(data(b"[DONE]"), NOW))
        case Input.BREAK:
            attempt.fail(ERROR)
        case Input.RETRY:
            attempt.retry()
        case Input.END:
            attempt.end()
        case Input.CANCEL:
            attempt.cancel("enough")
        case Input.WIND_UP:
            attempt.wind_up("enough")
        case Input.EXPIRE:
            attempt.expire()
        case Input.REFUSE:
            attempt.refuse(ERROR)


# The table, written a second time in another shape. A cell is the next state, or ! and the status of the end.
EXPECTED = """
             WAITING    CALLING     LISTENING    STREAMING     TRY_FAILED  WINDING_UP  ENDED
CALL         CALLING    -           -            -             -           -           -
ANSWER       -          LISTENING   -            -             -           -           -
DELTA        -          -           STREAMING    STREAMING     -           WINDING_UP  -
DONE         -          -           !COMPLETED   !COMPLETED    -           !CANCELLED  -
BREAK        !FAILED    TRY_FAILED  TRY_FAILED   !INTERRUPTED  -           !CANCELLED  -
RETRY        -          -           -            -             WAITING     -           -
END          -          -           -            -             !FAILED     -           -
CANCEL       !CANCELLED !CANCELLED  !CANCELLED   !CANCELLED    !CANCELLED  !CANCELLED  -
WIND_UP      -          -           -            WINDING_UP    -           -           -
EXPIRE       !EXPIRED   !EXPIRED    !EXPIRED     !EXPIRED      !EXPIRED    !CANCELLED  -
REFUSE       -          -           -            -             -           -           !INTERRUPTED
"""


def expected_transitions() -> dict[tuple[State, Input], Transition]:
    head, *rows = (line.split() for line in EXPECTED.strip().splitlines())
    transitions = {}
    for name, *cells in rows:
        for state, cell in zip(head, cells, strict=True):
            if cell.startswith("!"):
                transitions[State[state], Input[name]] = Transition(State.ENDED, Status[cell[1:]])
            elif cell != "-":
                transitions[State[state], Input[name]] = Transition(State[cell])
    return transitions


def test_transitions_are_the_expected_table() -> None:
    """No row more and no row less: no retry after a delta, and nothing but a refused delta after the end."""
    assert {
        (state, input_): to for state, row in TRANSITIONS.items() for input_, to in row.items()
    } == expected_transitions()
    assert set(TRANSITIONS) == set(State)


# Bytes are fed only while the stream is open: the caller checks `is_listening`.
_CLOSED = (State.WAITING, State.CALLING, State.TRY_FAILED, State.ENDED)
CASES = [
    (state, input_)
    for state in State
    for input_ in Input
    if state not in _CLOSED or input_ not in {Input.DELTA, Input.DONE}
]


_WITH_ERROR = {Input.BREAK, Input.END, Input.RETRY, Input.REFUSE}  # in the states where the table has a row


@pytest.mark.parametrize(("state", "input_"), CASES)
def test_attempt_every_input_in_every_state_follows_the_table(state: State, input_: Input) -> None:
    """A row leads to its state; a missing row raises and changes nothing."""
    attempt = in_state(state)
    before = (attempt.state, attempt.status, attempt.error, attempt.tries)
    expected = TRANSITIONS[state].get(input_)
    if expected is None:
        with pytest.raises(InvalidTransition, match=f"{input_.name} in {state.name}"):
            apply(attempt, input_)
        assert (attempt.state, attempt.status, attempt.error, attempt.tries) == before
    else:
        apply(attempt, input_)
        assert (attempt.state, attempt.status) == (expected.to, expected.status)
        assert (attempt.error == ERROR) is (input_ in _WITH_ERROR and state is not State.WINDING_UP)
        assert attempt.is_ended is (expected.status is not None)


def test_started_is_the_first_event_and_names_the_source() -> None:
    """It has `seq` 0, the job's coordinates and metadata, and the cause."""
    attempt = make_attempt(job=make_job(metadata={"k": "v"}), cause="redelivered")

    assert attempt.started() == Started(
        job_id="job-1",
        attempt="a-1",
        ts=NOW,
        model="m",
        upstream="default",
        cause="redelivered",
        source=Source("jobs", 3, 7),
        metadata={"k": "v"},
    )


def test_attempt_that_completes_gives_deltas_and_usage() -> None:
    """The terminal event has every member, and the deltas every member of their chunks."""
    stream = data(
        chunk({"content": "a🐟"}),
        chunk(
            {"content": "b"},
            "stop",
            usage={"n": 1},
            choices=[{"delta": {"content": "b"}, "finish_reason": "stop"}],
        ),
        b"[DONE]",
    )
    played = play(stream, job=make_job(metadata={"k": "v"}))
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    assert played.deltas == [
        DeltaEvent("job-1", "a-1", 1, NOW + 10, 0, {"content": "a🐟"}, None, chunk=head),
        DeltaEvent("job-1", "a-1", 2, NOW + 10, 0, {"content": "b"}, "stop"),
    ]
    end = played.end
    assert (end.seq, end.ts, end.status, end.error, end.tries) == (3, NOW + 30, Status.COMPLETED, None, 1)
    assert (end.usage, end.usage_source, end.finish_reasons) == (
        {"n": 1},
        UsageSource.UPSTREAM,
        {"0": "stop"},
    )
    assert end.observed == Observed(2, 2, 3, 0, len(stream))
    assert end.timing == Timing(queued=40, first_delta=10, total=30)
    assert end.metadata == {"k": "v"}
    assert end.estimate_method is msgspec.UNSET


def test_terminal_event_of_an_attempt_without_a_call() -> None:
    """A job may end before its first try."""
    attempt = make_attempt()
    attempt.started()
    attempt.expire()
    end = attempt.terminal(NOW + 5)

    assert (end.seq, end.status, end.tries, end.finish_reasons) == (1, Status.EXPIRED, 0, {})
    assert (end.usage, end.usage_source) == (None, UsageSource.NONE)
    assert end.timing == Timing(queued=40, first_delta=None, total=5)
    assert end.error == JobError(ErrorCode.DEADLINE, "the job's deadline passed")


@pytest.mark.parametrize("state", [State.LISTENING, State.TRY_FAILED])
def test_terminal_event_before_the_end_is_a_bug(state: State) -> None:
    """An attempt that may go on has no terminal event, also after a failed try."""
    with pytest.raises(InvalidTransition):
        in_state(state).terminal(NOW)


def test_timing_of_clocks_that_differ_is_not_negative() -> None:
    """The record's timestamp comes from another machine, and the worker's clock may be set back."""
    attempt = listening(job=make_job(timestamp=NOW + 99))
    list(attempt.receive(data(chunk({"content": "a"})), NOW - 5))
    attempt.cancel("")

    assert attempt.terminal(NOW - 7).timing == Timing(queued=0, first_delta=0, total=0)


def test_timing_first_delta_is_not_moved_by_later_deltas() -> None:
    """It is the time of the first delta."""
    attempt = listening()
    list(attempt.receive(data(chunk({"content": "a"})), NOW + 3))
    list(attempt.receive(data(chunk({"content": "b"})), NOW + 9))
    attempt.cancel("")

    assert attempt.terminal(NOW + 12).timing.first_delta == 3


def test_receive_after_the_sentinel_reads_no_more() -> None:
    """Bytes after `[DONE]` are ignored, also in the same read."""
    played = play(data(b"[DONE]", chunk({"content": "x"}), {"error": "late"}))

    assert (played.deltas, played.end.status, played.end.error) == ([], Status.COMPLETED, None)


def test_receive_error_after_deltas_keeps_them() -> None:
    """Text before the error stays; a `[DONE]` after it does not make the job complete."""
    played = play(data(chunk({"content": "a"}), {"error": {"message": "m", "code": 500}}, b"[DONE]"))

    assert played.text() == "a"
    assert (played.end.seq, played.end.status) == (2, Status.INTERRUPTED)
    assert played.end.error == JobError(
        ErrorCode.UPSTREAM_ERROR, "m", 200, '{"error":{"message":"m","code":500}}', retriable=True
    )


@pytest.mark.parametrize("pieces", [1, 2])
def test_receive_event_over_the_limit_ends_the_try(pieces: int) -> None:
    """The deltas before it are published, and the error names the limit."""
    stream = data(chunk({"content": "a"})) + b"data: " + b"x" * 600
    cut = len(stream) // pieces
    played = play([stream[at : at + cut] for at in range(0, len(stream), cut)], max_event_bytes=512)

    assert played.text() == "a"
    assert played.end.status is Status.INTERRUPTED
    assert played.end.error == JobError(
        ErrorCode.UPSTREAM_PROTOCOL, "the upstream sent an event of more than 512 bytes", 200
    )


@pytest.mark.parametrize(
    ("stream", "status", "message"),
    [
        (TEXT, Status.COMPLETED, None),
        (TEXT[:-1] + b"\ndata: [DONE]", Status.COMPLETED, None),
        (data(chunk({"content": "a"})), Status.INTERRUPTED, "with 1 unfinished choice(s)"),
        (data(chunk({})), Status.INTERRUPTED, "with 1 unfinished choice(s)"),
        (
            data({"choices": [{"index": i} for i in range(3)]}),
            Status.INTERRUPTED,
            "with 3 unfinished choice(s)",
        ),
        (b"", Status.FAILED, "without any choice"),
        (TEXT[:-1], Status.INTERRUPTED, "with 1 unfinished choice(s)"),
    ],
)
def test_close_without_sentinel_is_an_end_only_if_every_choice_finished(
    stream: bytes, status: Status, message: str | None
) -> None:
    """Some gateways send no `[DONE]`; a stream that was cut must not look complete."""
    end = play(stream).end

    assert end.status is status
    if message is None:
        assert end.error is None
    else:
        assert end.error == JobError(
            ErrorCode.TRUNCATED, f"the event stream ended without [DONE] and {message}", 200, retriable=True
        )


@pytest.mark.parametrize("pieces", [1, 7])
@pytest.mark.parametrize(
    ("stream", "told"),
    [
        (b"<html>bad gateway</html>", "<html>bad gateway</html>"),
        (data({"choices": []}), 'data: {"choices":[]}\n\n'),
        (b"Authorization: Bearer canary\nno", "Authorization: Bearer ***\nno"),
        (b"<" + b"x" * 2046 + "é".encode() + b"y" * 9000, "<" + "x" * 2046),
        (b"\xff\xfe", "\ufffd\ufffd"),
    ],
)
def test_close_without_any_choice_quotes_the_first_bytes(stream: bytes, told: str, pieces: int) -> None:
    """A body that is not an event stream, such as HTML, is quoted: bounded, and without secrets."""
    size = -(-len(stream) // pieces)
    end = play([stream[at : at + size] for at in range(0, len(stream), size)]).end

    assert end.error == JobError(
        ErrorCode.TRUNCATED,
        "the event stream ended without [DONE] and without any choice",
        200,
        told,
        retriable=True,
    )


def test_close_without_any_choice_quotes_the_last_try_only() -> None:
    """Each try has its own first bytes."""
    attempt = listening()
    assert list(attempt.receive(b"<html>first</html>", NOW)) == []
    assert list(attempt.close(NOW)) == []
    attempt.retry()
    attempt.call()
    attempt.answer()
    assert list(attempt.receive(b"<html>second</html>", NOW)) == []
    assert list(attempt.close(NOW)) == []

    assert attempt.error is not None
    assert attempt.error.upstream == "<html>second</html>"


BROKEN = JobError(ErrorCode.UPSTREAM_UNAVAILABLE, "connection reset", 200, retriable=True)


@pytest.mark.parametrize(
    ("stream", "status", "error"),
    [
        (TEXT, Status.COMPLETED, None),
        (data(chunk({"content": "a"})) + b"data: [DONE]", Status.COMPLETED, None),
        (data(chunk({"content": "a"})), Status.INTERRUPTED, BROKEN),
        (b"", Status.FAILED, BROKEN),
    ],
)
def test_close_of_a_broken_connection_is_an_error_only_if_something_is_missing(
    stream: bytes, status: Status, error: JobError | None
) -> None:
    """A connection that breaks after the last finish reason is not an error; otherwise its error is kept."""
    attempt = listening()
    list(attempt.receive(stream, NOW))
    list(attempt.close(NOW, broken=BROKEN))
    end = ended(attempt)

    assert (end.status, end.error) == (status, error)


def test_close_with_a_delta_and_the_sentinel_left_over_gives_both() -> None:
    """The rest of a body may hold a chunk and the sentinel, each on one line."""
    played = play(data(chunk({"content": "a"}), end=b"\n") + b"data: [DONE]")

    assert (played.text(), played.end.status, played.end.seq) == ("a", Status.COMPLETED, 2)


def test_close_with_an_error_and_the_sentinel_left_over_ends_once() -> None:
    """Of two events in the rest of a body, the first may end the attempt."""
    played = play(b'data: {"error":{"message":"m"}}\ndata: [DONE]')

    assert (played.end.status, played.end.error and played.end.error.message) == (Status.FAILED, "m")


def test_refuse_after_the_end_makes_the_job_interrupted() -> None:
    """The broker may refuse a delta after the end; readers miss it, so the job is not complete."""
    attempt = listening()
    list(attempt.receive(TEXT + data(b"[DONE]"), NOW))
    attempt.refuse(JobError(ErrorCode.TOO_LARGE, "too large"))
    end = attempt.terminal(NOW)

    assert (end.seq, end.status) == (3, Status.INTERRUPTED)
    assert end.error == JobError(ErrorCode.TOO_LARGE, "too large")


@pytest.mark.parametrize("published", [0, 1, 2])
def test_fail_while_an_event_is_yielded_drops_the_event(published: int) -> None:
    """An event that could not be published leaves no trace: its `seq` and its counts are the terminal event's."""
    attempt = listening()
    events = attempt.receive(data(*(chunk({"content": "ab"}) for _ in range(5))), NOW + 1)
    for _ in range(published):
        next(events)
    refused = next(events)
    attempt.fail(JobError(ErrorCode.TOO_LARGE, "too large"))
    assert list(events) == []
    end = ended(attempt, NOW + 2)

    assert end.seq == refused.seq == published + 1
    assert end.status is (Status.INTERRUPTED if published else Status.FAILED)
    assert end.observed.deltas == published
    assert end.observed.content_chars == 2 * published
    assert (end.timing.first_delta is None) is (published == 0)


def test_chunk_without_choices_has_a_number_but_is_not_a_delta() -> None:
    """It is published, and a try that gave nothing else may still be retried."""
    attempt = listening()
    first = list(attempt.receive(data({"choices": [], "filter": 1}), NOW))
    assert [(event.seq, event.choice, event.delta, event.extra) for event in first] == [
        (1, None, {}, {"filter": 1})
    ]
    assert attempt.state is State.LISTENING
    assert attempt.first_delta_ms is None
    attempt.fail(ERROR)
    attempt.retry()
    attempt.call()
    attempt.answer()
    second = list(attempt.receive(TEXT + data(b"[DONE]"), NOW))
    end = attempt.terminal(NOW)

    assert [event.seq for event in second] == [2, 3]
    assert second[0].chunk is not msgspec.UNSET
    assert (end.seq, end.tries, end.observed.deltas, end.status) == (4, 2, 2, Status.COMPLETED)


def test_answer_of_a_second_try_starts_a_new_stream() -> None:
    """An unfinished line of the first try is dropped; its bytes stay counted."""
    attempt = listening()
    list(attempt.receive(b'data: {"choices":[{"del', NOW))
    attempt.fail(ERROR)
    attempt.retry()
    attempt.call()
    attempt.answer()
    assert [event.delta for event in attempt.receive(TEXT, NOW)] == [{"content": "a"}, {"content": "b"}]
    list(attempt.close(NOW))
    assert attempt.error is None

    assert attempt.terminal(NOW).observed.bytes == len(TEXT) + 23


def test_llama_error_field_is_an_error() -> None:
    """`error:` is not a field of the standard; older versions of llama.cpp send errors in it."""
    played = play(data(chunk({"content": "a"})) + b'error: {"code":500,"message":"m"}\n\n' + data(b"[DONE]"))

    assert played.end.status is Status.INTERRUPTED
    assert played.end.error is not None
    assert played.end.error.message == "m"


@pytest.mark.parametrize(
    ("reason", "message"), [("enough", "enough"), ("", "cancelled"), ("x" * 9999, "x" * 2048)]
)
def test_cancel_keeps_the_reason_within_bounds(reason: str, message: str) -> None:
    """The record's reason is cut to its limit; an empty one becomes `cancelled`."""
    attempt = make_attempt()
    attempt.cancel(reason)

    assert attempt.error == JobError(ErrorCode.CANCELLED, message)


def test_error_is_redacted_and_cut() -> None:
    """Neither the message nor the frame holds a secret, and both are bounded."""
    attempt = listening(scrub=Redactor(["hunter-two"]))
    words = "hunter-two " + "x" * 9000
    attempt.fail(JobError(ErrorCode.AUTH, words, 401, words, retriable=False))

    assert attempt.error == JobError(
        ErrorCode.AUTH, ("*** " + "x" * 9000)[:2048], 401, ("*** " + "x" * 9000)[:2048]
    )


def test_error_without_a_redactor_of_its_own_is_redacted_by_shape() -> None:
    """Text in the shape of an API key is always removed."""
    attempt = listening()
    attempt.fail(JobError(ErrorCode.AUTH, "bad key sk-abcdefghijk", 401))

    assert attempt.error == JobError(ErrorCode.AUTH, "bad key ***", 401)


@pytest.mark.parametrize(
    ("ending", "source"), [(data(b"[DONE]"), UsageSource.UPSTREAM), (b"", UsageSource.UPSTREAM_PARTIAL)]
)
def test_usage_that_was_a_running_total_is_partial_only_if_the_stream_broke(
    ending: bytes, source: UsageSource
) -> None:
    """The last running total before a break is reported as partial."""
    end = play(data(chunk({"content": "a"}, usage={"completion_tokens": 1})) + ending).end

    assert (end.usage, end.usage_source) == ({"completion_tokens": 1}, source)


def test_finish_reasons_are_ordered_by_choice() -> None:
    """Choices that did not finish are left out."""
    payload: dict[str, Any] = {
        "choices": [
            {"index": 10, "finish_reason": "length"},
            {"index": 1},
            {"index": 2, "finish_reason": "stop"},
        ]
    }

    assert list(play(data(payload, b"[DONE]")).end.finish_reasons.items()) == [
        ("2", "stop"),
        ("10", "length"),
    ]


def test_estimate_names_its_method() -> None:
    """Text without a usage report gives an estimate, which is marked as one."""
    end = play(data(chunk({"content": "abcdefgh"}))).end

    assert (end.usage, end.usage_source) == ({"completion_tokens": 2}, UsageSource.ESTIMATED)
    assert isinstance(end.estimate_method, str)


def test_error_with_a_secret_across_the_cut_keeps_no_part_of_it() -> None:
    """Secrets are removed before the text is cut."""
    secret = "s3cr3t-key-value-0123456789"
    attempt = make_attempt(scrub=lambda text: text.replace(secret, "***"))
    attempt.started()
    attempt.call()
    attempt.answer()
    message = "x" * (2048 - 10) + secret
    frame = b'data: {"error":{"message":"' + message.encode() + b'"}}\n\n'
    assert list(attempt.receive(frame, 0)) == []

    assert attempt.error is not None
    assert "s3cr3t" not in attempt.error.message + (attempt.error.upstream or "")


def test_wind_up_publishes_nothing_more_and_reads_the_usage_report() -> None:
    """The stream is read to its end; the job ends `cancelled`, with the upstream's usage report."""
    attempt = in_state(State.STREAMING)
    attempt.wind_up("enough")
    assert list(attempt.receive(data(chunk({"content": "b"}), chunk({}, "stop")), NOW)) == []
    assert attempt.is_listening
    report = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    assert list(attempt.receive(data(report, b"[DONE]"), NOW)) == []
    terminal = attempt.terminal(NOW)

    assert (terminal.status, terminal.seq) == (Status.CANCELLED, 2)
    assert (terminal.usage_source, terminal.usage) == (
        "upstream",
        {"prompt_tokens": 3, "completion_tokens": 2},
    )
    assert terminal.error == JobError(ErrorCode.CANCELLED, "enough")
    assert terminal.observed.deltas == 1
    assert terminal.observed.content_chars == 1


def test_wind_up_without_a_report_is_estimated() -> None:
    """When the grace is over, the usage is estimated from the published text."""
    attempt = in_state(State.WINDING_UP)
    attempt.cancel("grace over")
    terminal = attempt.terminal(NOW)

    assert (terminal.status, terminal.usage_source) == (Status.CANCELLED, "estimated")
    assert terminal.error == JobError(ErrorCode.CANCELLED, "enough")


def test_attempt_describes_the_answer_of_its_latest_try() -> None:
    """Chunk members, finish reasons and usage report are those of one try, not of an earlier one."""
    attempt = listening()
    assert (attempt.finish_reasons, attempt.chunk, attempt.reported_usage) == ({}, {}, None)
    list(attempt.receive(data({"choices": [], "usage": {"completion_tokens": 1}}), NOW))
    running_total = attempt.reported_usage
    attempt.fail(ERROR)
    attempt.retry()
    attempt.call()
    attempt.answer()
    last = data(
        chunk({"content": "a"}, "stop", id="second"),
        {"choices": [], "usage": {"completion_tokens": 2}},
        b"[DONE]",
    )
    list(attempt.receive(last, NOW))

    assert running_total is None
    assert (attempt.finish_reasons, attempt.reported_usage) == ({0: "stop"}, {"completion_tokens": 2})
    assert (attempt.chunk["id"], attempt.chunk["model"]) == ("second", "m")


@pytest.mark.parametrize("timestamp", [0, -1])
def test_timing_of_a_record_without_a_timestamp_is_unknown(timestamp: int) -> None:
    """Zero and -1 mean that there is none; the job was not queued for 57 years."""
    attempt = make_attempt(job=make_job(timestamp=timestamp))
    attempt.cancel("")

    assert attempt.terminal(NOW).timing.queued is None


def test_wind_up_while_an_event_is_yielded_counts_it_as_published() -> None:
    """The caller was publishing it when the cancellation came; the events behind it are not yielded."""
    attempt = in_state(State.STREAMING)
    reading = attempt.receive(data(chunk({"content": "b"}), chunk({"content": "c"}), b"[DONE]"), NOW)
    assert next(reading).delta == {"content": "b"}
    attempt.wind_up("enough")
    assert list(reading) == []
    terminal = attempt.terminal(NOW)

    assert (terminal.status, terminal.seq) == (Status.CANCELLED, 3)
    assert (terminal.observed.deltas, terminal.observed.content_chars) == (2, 2)


def test_refuse_after_a_wind_up_ends_with_the_brokers_error() -> None:
    """A reader misses a delta, which the cancellation does not explain."""
    attempt = in_state(State.WINDING_UP)
    list(attempt.receive(data(b"[DONE]"), NOW))
    assert (attempt.status, attempt.error) == (Status.CANCELLED, JobError(ErrorCode.CANCELLED, "enough"))
    attempt.refuse(ERROR)

    assert (attempt.status, attempt.error) == (Status.INTERRUPTED, ERROR)


def test_terminal_event_adds_up_the_reports_of_failed_tries() -> None:
    """They were paid for; a try that reported nothing is not counted."""
    attempt = listening()
    report = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    for stream in (data(report), data(b"{}"), data(report)):
        list(attempt.receive(stream, NOW))
        attempt.fail(ERROR)
        attempt.retry()
        attempt.call()
        attempt.answer()
    list(attempt.receive(TEXT, NOW))
    list(attempt.close(NOW))
    terminal = attempt.terminal(NOW)

    assert terminal.voided == Voided(2, {"prompt_tokens": 6, "completion_tokens": 2})
    assert (terminal.tries, terminal.usage_source) == (4, UsageSource.ESTIMATED)
    assert play(TEXT).end.voided is msgspec.UNSET


def test_terminal_event_continues_the_account_of_earlier_attempts() -> None:
    """A restarted job has one terminal event for all its calls."""
    earlier = VoidedUsage()
    earlier.add({"completion_tokens": 5})
    end = play(TEXT, tries=2, voided=earlier).end

    assert end.tries == 3
    assert end.voided == Voided(1, {"completion_tokens": 5})


def merging() -> Attempt:
    """Return an attempt that has published one delta and holds two."""
    attempt = listening(coalescer=Coalescer())
    stream = data(*(chunk({"content": text}) for text in "abc"))
    assert [event.delta for event in attempt.receive(stream, NOW)] == [{"content": "a"}]
    assert attempt.held_deltas == 2
    return attempt


def test_flush_yields_the_held_text_as_one_delta_of_the_time_when_it_came() -> None:
    """Each part counts as a delta of the upstream's; nothing is held behind it."""
    attempt = merging()
    list(attempt.receive(data(chunk({"content": "d"})), NOW + 5))
    [event] = attempt.flush()

    assert (event.seq, event.ts, event.delta) == (2, NOW, {"content": "bcd"})
    assert (attempt.held_deltas, list(attempt.flush())) == (0, [])
    assert (attempt.seq, attempt.ledger.observed.deltas) == (3, 4)


def test_flush_that_is_not_published_keeps_the_text() -> None:
    """A caller that fails to publish the event ends the attempt; the number is given to the terminal event."""
    attempt = merging()
    flushing = attempt.flush()
    assert next(flushing).seq == 2
    attempt.fail(ERROR)
    assert list(flushing) == []

    assert (attempt.held_deltas, list(attempt.flush())) == (2, [])
    assert (attempt.terminal(NOW).seq, attempt.terminal(NOW).observed.deltas) == (2, 1)


def test_flush_outside_of_the_stream_yields_nothing() -> None:
    """Neither without a coalescer, nor without text, nor after a cancellation."""
    held = merging()
    held.wind_up("enough")
    empty = listening(coalescer=Coalescer())

    assert [list(attempt.flush()) for attempt in (held, empty, in_state(State.STREAMING))] == [[], [], []]
    assert [attempt.held_deltas for attempt in (empty, in_state(State.STREAMING))] == [0, 0]


def test_close_yields_the_held_text_before_it_ends_the_attempt() -> None:
    """Also where the connection broke."""
    for broken in (None, ERROR):
        attempt = merging()
        assert [event.delta for event in attempt.close(NOW, broken=broken)] == [{"content": "bc"}]
        assert (attempt.status, attempt.terminal(NOW).seq) == (Status.INTERRUPTED, 3)


@pytest.mark.parametrize(
    ("body", "broken", "code"),
    [
        (b'{"error":{"message":"no such model","code":404}}', None, None),
        (b'{"error":{"message":"no such model","code":404}}', ERROR, None),
        (b'{"error":{"message":"no such', None, None),
        (b'{"error":{"message":"no such', ERROR, ErrorCode.TIMEOUT_IDLE),
    ],
)
def test_close_of_a_document_is_the_error_that_it_holds(
    body: bytes, broken: JobError | None, code: ErrorCode | None
) -> None:
    """A connection that broke behind a whole document changes nothing; half a document explains nothing."""
    attempt = listening()
    list(attempt.receive(body, NOW))
    list(attempt.close(NOW, broken=broken))

    assert attempt.state is State.TRY_FAILED
    assert attempt.error is not None
    if code is None:
        assert attempt.error.code is not ErrorCode.TIMEOUT_IDLE
        assert "no such" in attempt.error.message + (attempt.error.upstream or "")
    else:
        assert attempt.error == broken


def test_answer_after_a_document_reads_an_event_stream() -> None:
    """The form of a body is decided anew by each try."""
    attempt = listening()
    list(attempt.receive(b'{"error":{"message":"busy"}}', NOW))
    list(attempt.close(NOW))
    attempt.retry()
    attempt.call()
    attempt.answer()

    assert [event.delta for event in attempt.receive(TEXT, NOW)] == [{"content": "a"}, {"content": "b"}]
    assert list(attempt.close(NOW)) == []
    assert attempt.status is Status.COMPLETED
