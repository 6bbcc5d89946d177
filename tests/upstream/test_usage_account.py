"""The terminal event's usage and counts, compared with those of the upstream, for every way to end.

The practice upstream counts the deltas, chunks, characters, bytes and usage reports that it writes. Two differences are
expected: after a reset the kernel may drop bytes, so that less arrives than was sent; and what follows the event that
ends a job, such as a `[DONE]` after an error, is not read.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, NamedTuple

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamworker.model import ErrorCode, Status, UsageSource
from streamworker.practice import Call, PracticeUpstream, expected_text, expected_usage
from streamworker.practice import errors as practice_errors
from streamworker.practice.script import Fault
from streamworker.practice.shapes import CALLS, CONTENTS, REASONINGS, SHAPES, USAGES
from streamworker.stream.usage import ESTIMATE_METHOD
from tests.streams import NOW
from tests.turnable import SocketLoop, run
from tests.upstream.one_job import MESSAGES, Outcome, run_job

REPORTED, PARTIAL = UsageSource.UPSTREAM, UsageSource.UPSTREAM_PARTIAL
ESTIMATED, NOTHING = UsageSource.ESTIMATED, UsageSource.NONE
COMPLETED, INTERRUPTED, FAILED = Status.COMPLETED, Status.INTERRUPTED, Status.FAILED


class Unread(Enum):
    """What may be missing in the terminal event, compared with what the upstream counted."""

    NOTHING = "both are the same"
    TAIL = "bytes after the event that ended the job"
    BODY = "the upstream does not count a body that is not a stream"
    ANYTHING = "whatever the kernel had not delivered when the connection was reset"


class Way(NamedTuple):
    """A way for a job to end. `model` holds the script's options; a cancellation or the deadline comes at
    `at_s`."""

    model: str
    status: Status
    source: UsageSource
    code: ErrorCode | None = None
    unread: Unread = Unread.NOTHING
    cancel_at_s: float | None = None
    deadline_s: float | None = None


def broke(model: str, source: UsageSource, unread: Unread = Unread.NOTHING) -> Way:
    """The stream was cut after a delta."""
    return Way(model, INTERRUPTED, source, ErrorCode.TRUNCATED, unread)


WELL = {
    "usage with the finish": Way("deltas=5", COMPLETED, REPORTED),
    "usage in its own chunk": Way("deltas=5&usage=own", COMPLETED, REPORTED),
    "running totals": Way("deltas=5&usage=running", COMPLETED, REPORTED),
    "no usage": Way("deltas=5&usage=none", COMPLETED, ESTIMATED),
    "no usage, no text": Way("deltas=0&usage=none", COMPLETED, NOTHING),
    "usage, no text": Way("deltas=0", COMPLETED, REPORTED),
    "no finish": Way("deltas=5&finish=none", COMPLETED, REPORTED),
    "cut by length": Way("deltas=5&finish=length", COMPLETED, REPORTED),
    "no [DONE]": Way("deltas=5&no_done", COMPLETED, REPORTED),
    "no [DONE], no usage": Way("deltas=5&no_done&usage=none", COMPLETED, ESTIMATED),
    "[DONE] without a newline": Way("deltas=5&done=no_newline&framing=close", COMPLETED, REPORTED),
    "[DONE] with blanks": Way("deltas=5&done=blanks", COMPLETED, REPORTED),
    "[DONE] under a name": Way("deltas=5&done=named", COMPLETED, REPORTED),
    "junk after [DONE]": Way("deltas=5&done=junk", COMPLETED, REPORTED, unread=Unread.TAIL),
    "body of known length": Way("deltas=5&framing=length", COMPLETED, REPORTED),
    "body to the connection's end": Way("deltas=5&framing=close", COMPLETED, REPORTED),
    "byte by byte": Way("deltas=3&chunk_bytes=1", COMPLETED, REPORTED),
    "compressed": Way("deltas=5&encoding=gzip", COMPLETED, REPORTED),
    "logprobs": Way("deltas=5&logprobs", COMPLETED, REPORTED),
    "choices": Way("deltas=5&choices=3", COMPLETED, REPORTED),
    "choices in one chunk": Way("deltas=5&choices=3&packed", COMPLETED, REPORTED),
    "every kind of keep-alive": Way(
        "deltas=14&keepalive=all&first_delta_ms=9000&ping_ms=1000", COMPLETED, REPORTED
    ),
}
FORMATTED = {
    f"format {name}": Way(f"deltas=5&format={name}", COMPLETED, REPORTED)
    for name in ("unblanked", "crlf", "cr", "no_space", "multiline", "bom")
}
SHAPED = {
    shape: Way(f"shape={shape}&deltas=6&reasoning=2&tool_calls=2&choices=2", COMPLETED, REPORTED)
    for shape in SHAPES
}
SAID = {
    f"{option}={value}": Way(f"{option}={value}&deltas=6&reasoning=2&tool_calls=2", COMPLETED, REPORTED)
    for option, values in {"content_as": CONTENTS, "reasoning_as": REASONINGS, "calls_as": CALLS}.items()
    for value in values
} | {
    f"usage={value}": Way(f"usage={value}&deltas=6&choices=2", COMPLETED, REPORTED)
    for value in USAGES
    if value != "none"
}

ERRORS = [
    name for name in practice_errors.ERRORS if name not in {"html", "text", "empty", "detail", "message"}
]
UNSAID = {
    "error status": Way("status=503", FAILED, NOTHING, ErrorCode.UPSTREAM_UNAVAILABLE),
    "error under 200": Way("error200&error=xai", FAILED, NOTHING, ErrorCode.UPSTREAM_PROTOCOL, Unread.BODY),
    "html under 200": Way("html200", FAILED, NOTHING, ErrorCode.UPSTREAM_PROTOCOL, Unread.BODY),
    "no answer": Way("no_answer=close", FAILED, NOTHING, ErrorCode.UPSTREAM_UNAVAILABLE),
    "end at once": Way("end_after=0", FAILED, NOTHING, ErrorCode.TRUNCATED),
    "close at once": Way("close_after=0", FAILED, NOTHING, ErrorCode.TRUNCATED),
    "reset at once": Way("break_after=0", FAILED, NOTHING, ErrorCode.TRUNCATED, Unread.ANYTHING),
    "error at once": Way("error_frame_after=0", FAILED, NOTHING, ErrorCode.UPSTREAM_ERROR),
    "garbage at once": Way("garbage_after=0", FAILED, NOTHING, ErrorCode.UPSTREAM_PROTOCOL),
    "silence": Way("stall_after=0", FAILED, NOTHING, ErrorCode.TIMEOUT_FIRST_DELTA),
    "keep-alives": Way("ping_stall_after=0&ping_ms=7000", FAILED, NOTHING, ErrorCode.TIMEOUT_FIRST_DELTA),
    "not compressed as it says": Way(
        "encoding=lie", FAILED, NOTHING, ErrorCode.UPSTREAM_PROTOCOL, Unread.ANYTHING
    ),
    "a line without end": Way(
        "endless_line", INTERRUPTED, NOTHING, ErrorCode.UPSTREAM_PROTOCOL, Unread.ANYTHING
    ),
    "cancelled in silence": Way(
        "stall_after=0", Status.CANCELLED, NOTHING, ErrorCode.CANCELLED, cancel_at_s=3
    ),
    "expired in silence": Way("stall_after=0", Status.EXPIRED, NOTHING, ErrorCode.DEADLINE, deadline_s=3),
}


def _half_said(suffix: str, source: UsageSource) -> dict[str, Way]:
    """Every way to end after four deltas of ten."""
    ways = {
        "end": broke("end_after=4", source),
        "end without a length": broke("end_after=4&framing=close", source),
        "end inside what is compressed": broke("end_after=4&encoding=gzip", source),
        "close": broke("close_after=4", source),
        "close before the length": broke("close_after=4&framing=length", source),
        "cut inside a chunk of HTTP": broke("cut_after=4", source),
        "cut inside a character": broke("cut_utf8_after=4", source),
        "reset": broke("break_after=4&pace_ms=5", source, Unread.ANYTHING),
        "silence": Way("stall_after=4", INTERRUPTED, source, ErrorCode.TIMEOUT_IDLE),
        "keep-alives": Way("ping_stall_after=4&ping_ms=7000", INTERRUPTED, source, ErrorCode.TIMEOUT_IDLE),
        "garbage": Way("garbage_after=4", INTERRUPTED, source, ErrorCode.UPSTREAM_PROTOCOL),
        "an empty chunk": broke("error_frame_after=4&error=empty", source),
        "error, [DONE]": Way(
            "error_then_done_after=4", INTERRUPTED, source, ErrorCode.UPSTREAM_ERROR, Unread.TAIL
        ),
        "cancelled": Way("stall_after=4", Status.CANCELLED, source, ErrorCode.CANCELLED, cancel_at_s=3),
        "expired": Way("stall_after=4", Status.EXPIRED, source, ErrorCode.DEADLINE, deadline_s=3),
    }
    ways |= {
        f"error of {name}": Way(
            f"error_frame_after=4&error={name}", INTERRUPTED, source, ErrorCode.UPSTREAM_ERROR
        )
        for name in ERRORS
    }
    return {
        f"{name}{suffix and ', '}{suffix}": way._replace(model=f"deltas=10&reasoning=1&{way.model}")
        for name, way in ways.items()
    }


HALF = _half_said("", ESTIMATED)
RUNNING = {
    name: way._replace(model=way.model + "&usage=running")
    for name, way in _half_said("running totals", PARTIAL).items()
}
ALL_SAID = {
    "error after everything": Way("deltas=3&error_frame_after=3", COMPLETED, REPORTED),
    "close after everything": Way("deltas=3&close_after=3", COMPLETED, REPORTED),
    "silence after everything": Way("deltas=3&stall_after=3", COMPLETED, REPORTED),
    "close before the usage": Way("deltas=3&close_after=3&usage=own", COMPLETED, ESTIMATED),
    "one choice still speaks": broke("deltas=3&choices=2&end_after=5&usage=running", PARTIAL),
}

GROUPS = {
    "well": WELL | FORMATTED,
    "shape": SHAPED,
    "said": SAID,
    "unsaid": UNSAID,
    "half": HALF | RUNNING,
    "all": ALL_SAID,
}
WAYS = {f"{group} | {name}": way for group, ways in GROUPS.items() for name, way in ways.items()}


async def played(way: Way) -> tuple[Outcome, Call]:
    """Run a job to this end; return the upstream's record of the call as well."""
    job: dict[str, Any] = {}
    if way.deadline_s is not None:
        job["deadline"] = NOW / 1000 + way.deadline_s
    async with PracticeUpstream() as practice:
        outcome = await run_job(
            practice.base_url,
            model=f"practice?{way.model}",
            max_tries=1,
            job=job,
            cancel_at_s=way.cancel_at_s,
        )
        await practice.until(lambda: not practice.open_streams)
        return outcome, practice.calls[-1]


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_usage_account_agrees_with_the_upstream(way: Way) -> None:
    """Status, usage source and counts, for every way to end."""
    outcome, call = run(played(way), SocketLoop)
    end, sent = outcome.end, call.sent

    assert (end.status, outcome.code, end.usage_source) == (way.status, way.code, way.source)
    ours = (
        end.observed.deltas,
        end.observed.chunks,
        end.observed.content_chars,
        end.observed.reasoning_chars,
    )
    theirs = (sent.deltas, sent.chunks, sent.content_chars, sent.reasoning_chars)
    if way.unread is Unread.ANYTHING:
        assert all(our <= their for our, their in zip(ours, theirs, strict=True))
        assert end.observed.bytes <= sent.bytes
    else:
        assert ours == theirs
        assert end.observed.bytes == sent.bytes or (
            end.observed.bytes < sent.bytes if way.unread is Unread.TAIL else way.unread is Unread.BODY
        )
    _check_usage(way, outcome, call)
    if not any(fault.value in way.model for fault in Fault) and way.status is COMPLETED:
        _check_whole(way, outcome)


def _check_whole(way: Way, outcome: Outcome) -> None:
    """Compare a whole answer with the expected counts: both accounts could share an error."""
    model = f"practice?{way.model}"

    assert outcome.end.observed.content_chars == sum(map(len, expected_text(model, MESSAGES)))
    if way.source is REPORTED:
        assert outcome.end.usage == expected_usage(model, MESSAGES)


def _check_usage(way: Way, outcome: Outcome, call: Call) -> None:
    """Reports are verbatim, the last one counts; estimates name their method and exclude the prompt."""
    end = outcome.end
    match way.source:
        case UsageSource.UPSTREAM | UsageSource.UPSTREAM_PARTIAL:
            assert end.usage == call.usage_sent
            assert end.usage
            assert not end.estimate_method
        case UsageSource.ESTIMATED:
            assert call.usage_sent is None
            assert end.usage is not None
            assert list(end.usage) == ["completion_tokens"]
            assert 0 < end.usage["completion_tokens"] <= end.observed.bytes
            assert end.estimate_method == ESTIMATE_METHOD
        case UsageSource.NONE:
            assert (end.usage, end.observed.content_chars, end.observed.reasoning_chars) == (None, 0, 0)
            assert not end.estimate_method


def test_usage_account_of_several_tries_sums_counts_and_keeps_the_last_report() -> None:
    """The bytes of a failed try were received too; its usage is not the answer's."""

    async def work() -> tuple[Outcome, list[Call]]:
        model = "practice?deltas=5&error_frame_after=0&times=2"
        async with PracticeUpstream() as practice:
            outcome = await run_job(practice.base_url, model=model)
            await practice.until(lambda: not practice.open_streams)
            return outcome, list(practice.calls)

    outcome, calls = run(work(), SocketLoop)

    assert (outcome.end.status, outcome.end.tries, len(calls)) == (COMPLETED, 3, 3)
    assert outcome.end.observed.bytes == sum(call.sent.bytes for call in calls)
    assert outcome.end.observed.deltas == calls[-1].sent.deltas
    assert (outcome.end.usage, outcome.end.usage_source) == (calls[-1].usage_sent, REPORTED)


def test_usage_account_without_a_requested_report_is_an_estimate() -> None:
    """Some upstreams report usage only on request, and some reject the request."""

    async def work() -> tuple[Outcome, Call]:
        async with PracticeUpstream() as practice:
            model = "practice?deltas=5&usage=own"
            outcome = await run_job(practice.base_url, model=model, include_usage=False)
            return outcome, practice.calls[-1]

    outcome, call = run(work(), SocketLoop)

    assert "stream_options" not in call.body
    assert (call.usage_sent, outcome.end.usage_source) == (None, ESTIMATED)


SPOKEN = {
    "shape": SHAPES,
    "usage": USAGES,
    "content_as": CONTENTS,
    "reasoning_as": REASONINGS,
    "calls_as": CALLS,
    "keepalive": ("comment", "event", "json", "null", "retry"),
    "format": ("crlf", "cr", "no_space", "multiline", "bom"),
    "framing": ("close", "chunked"),
    "encoding": ("gzip",),
    "choices": ("1", "2", "3"),
    "reasoning": ("0", "2"),
    "tool_calls": ("0", "1"),
}
ENDS = ("end_after=1", "close_after=2", "cut_after=3", "error_frame_after=1&error=llamacpp", "stall_after=2")


@st.composite
def models(draw: st.DrawFn) -> str:
    """Options that no other test combines."""
    names = draw(st.sets(st.sampled_from(sorted(SPOKEN))))
    options = [f"{name}={draw(st.sampled_from(sorted(SPOKEN[name])))}" for name in sorted(names)]
    end = draw(st.sampled_from(["", *ENDS]))
    return "&".join([*options, "deltas=3", *filter(None, [end])])


@settings(max_examples=60, deadline=None)
@given(models())
def test_usage_account_holds_for_combined_shapes(model: str) -> None:
    """Whatever the chunks' format and the stream's end: the counts agree, and no report is lost."""
    outcome, call = run(played(Way(model, COMPLETED, REPORTED)), SocketLoop)
    end = outcome.end

    assert msgspec.structs.asdict(end.observed) == {
        name: getattr(call.sent, name)
        for name in ("deltas", "chunks", "content_chars", "reasoning_chars", "bytes")
    }
    if call.usage_sent is not None:
        assert end.usage == call.usage_sent
        assert end.usage_source in {REPORTED, PARTIAL}
    else:
        assert end.usage_source in {ESTIMATED, NOTHING}
    if not any(fault.value in model for fault in Fault):
        cut_short = (
            "shape=litellm" in model and "content_as=audio" in model
        )  # neither finish reason nor [DONE]
        assert end.status is (INTERRUPTED if cut_short else COMPLETED)


def test_usage_account_table_has_every_fault_of_the_practice_upstream() -> None:
    """A new fault needs a row."""
    played_faults = {fault for fault in Fault for way in WAYS.values() if f"{fault.value}=" in way.model}

    assert played_faults == set(Fault)
