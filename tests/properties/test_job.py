"""Job records: any bytes are a job or a rejection, and a rejection repeats no content."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from streamworker.model import ConsumerRecord, Coordinates, Job, Rejection
from streamworker.wire.job import MAX_FAULTS, MAX_NAME, job_id_of, read_job, request_body
from tests.properties.strategies import JSON, escaped

CANARY = "canary"
_MEMBERS = st.sampled_from(
    [
        "job_id",
        "request",
        "upstream",
        "deadline",
        "reply_to",
        "on_break",
        "metadata",
        "x",
        "job-id",
        "\ud83d",
        "",
    ]
)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.just("\ud83d")
    | st.sampled_from(["", "m", "fail"])
)
_REQUEST = st.dictionaries(
    st.sampled_from(["model", "messages", "stream", "stream_options"]), JSON | st.just("m")
)
_JOB_LIKE = st.dictionaries(_MEMBERS, _LEAVES | JSON | _REQUEST, max_size=8)

_SECRET = st.sampled_from([CANARY, f"{CANARY}\ud83d", f"{CANARY} {CANARY}", f"a{CANARY}\n", CANARY * 99])
_SECRETIVE = st.recursive(
    _SECRET,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_SECRET, inner, max_size=3),
    max_leaves=5,
)


def record(value: bytes) -> ConsumerRecord:
    return ConsumerRecord(Coordinates("jobs", 0, 7), 0, None, value)


def check(result: Job | Rejection) -> None:
    assert result.job_id
    if isinstance(result, Rejection):
        assert 1 <= len(result.faults) <= MAX_FAULTS + 1
        assert all(len(fault) <= MAX_NAME + 100 for fault in result.faults)


@given(st.binary(max_size=80) | st.text('{}[]":,\\ud83e01 jobrequest', max_size=60).map(str.encode))
def test_read_job_any_bytes_are_a_job_or_a_rejection(value: bytes) -> None:
    """No record makes it raise."""
    check(read_job(record(value)))
    assert job_id_of(record(value)) == read_job(record(value)).job_id


@given(_JOB_LIKE)
def test_read_job_any_object_is_a_job_or_a_rejection_with_few_short_faults(value: Any) -> None:
    """A job can be called, a rejection fits into a header."""
    result = read_job(record(escaped(value)))

    check(result)
    if isinstance(result, Job):
        assert msgspec.json.decode(request_body(result, include_usage=True))["stream"] is True


@given(
    st.dictionaries(
        st.sampled_from(
            ["job_id", "request", "upstream", "deadline", "reply_to", "on_break", "metadata", "x"]
        ),
        _SECRETIVE
        | st.fixed_dictionaries(
            {}, optional={"model": _SECRETIVE, "messages": _SECRETIVE, CANARY: _SECRETIVE}
        ),
    ),
    st.integers(0, 400),
)
def test_read_job_faults_never_repeat_the_content(value: Any, cut: int) -> None:
    """Values, nested names, invalid JSON: prompts must not appear in headers and logs."""
    whole = escaped(value)
    for text in (whole, whole[: -1 - cut % len(whole)], whole.replace(b":", b"", 1), whole + b"\xff"):
        result = read_job(record(text))
        if isinstance(result, Rejection):
            assert CANARY not in " ".join(result.faults)


_SPACES = st.sampled_from(["", " ", "\n", "  "])
_RAW = st.sampled_from(
    [
        "1",
        "-0",
        "1.0e+2",
        "1E400",
        "0.10",
        "18446744073709551616",
        '"\\u00e9"',
        '"\\/"',
        '"é"',
        "null",
        "true",
        '{ "b" : 1 , "a" : [ ] }',
        "[1,\n2]",
        '{"a":1,"a":2}',
        '"\u2028"',
    ]
)


@given(
    st.dictionaries(st.sampled_from(["x", "y", "temperature", "tools", "é", "a b"]), _RAW),
    _RAW,
    _SPACES,
    st.booleans(),
)
def test_request_body_passes_members_byte_for_byte(
    members: dict[str, str], message: str, space: str, include_usage: bool
) -> None:
    """Numbers, escapes, blanks and repeated names inside of a member are the sender's."""
    given_members = {"model": '"m"', "messages": f"[{message}]"} | members
    body = f",{space}".join(f'"{name}"{space}:{space}{raw}{space}' for name, raw in given_members.items())
    job = read_job(record(f'{{"request":{space}{{{body}}}}}'.encode()))
    assert isinstance(job, Job)
    sent = msgspec.json.decode(request_body(job, include_usage=include_usage), type=dict[str, msgspec.Raw])
    told = {name: bytes(raw).decode() for name, raw in sent.items()}
    ours = {"stream": "true"} | ({"stream_options": '{"include_usage":true}'} if include_usage else {})

    assert told == given_members | ours
