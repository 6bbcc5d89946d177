"""Job records: a job, or a rejection that names every fault and repeats no content."""

from __future__ import annotations

import tracemalloc
from typing import Any

import msgspec
import pytest

from streamworker.model import ConsumerRecord, Coordinates, Headers, Job, Rejection
from streamworker.wire.job import (
    MAX_FAULTS,
    MAX_NAME,
    is_rerun,
    job_id_of,
    read_job,
    request_body,
    trace_of,
)

REQUEST: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
AT = Coordinates("jobs", 3, 14)


def record(value: Any, headers: Headers = ()) -> ConsumerRecord:
    return ConsumerRecord(
        AT, 1000, b"k", value if isinstance(value, bytes) else msgspec.json.encode(value), headers
    )


def job(value: Any) -> Job:
    result = read_job(record(value))
    assert isinstance(result, Job), result
    return result


def faults(value: Any, *, max_bytes: int = 1 << 20) -> tuple[str, ...]:
    result = read_job(record(value), max_bytes=max_bytes)
    assert isinstance(result, Rejection), result
    return result.faults


def test_read_job_smallest_takes_its_id_from_its_coordinates() -> None:
    """A redelivered record keeps its id; absent members have their documented defaults."""
    assert job({"request": REQUEST}) == Job(
        job_id="jobs-3-14",
        source=AT,
        timestamp=1000,
        model="m",
        request={
            "model": msgspec.Raw(b'"m"'),
            "messages": msgspec.Raw(msgspec.json.encode(REQUEST["messages"])),
        },
    )


def test_read_job_with_every_member_reads_them_all() -> None:
    """Each member is read to its attribute."""
    read = read_job(
        record(
            {
                "job_id": "a.b_c:d-1",
                "request": REQUEST,
                "upstream": "local",
                "deadline": "2030-01-31T12:00:00.5+01:00",
                "reply_to": "replies",
                "on_break": "restart",
                "deltas": "merged",
                "metadata": {"k": "v"},
                "max_wait_s": 2.5,
            },
            (("traceparent", b"00-1"), ("other", b"x")),
        )
    )

    assert isinstance(read, Job)
    assert (read.deltas, read.max_wait_s) == ("merged", 2.5)
    assert (read.job_id, read.upstream, read.reply_to, read.on_break) == (
        "a.b_c:d-1",
        "local",
        "replies",
        "restart",
    )
    assert (read.deadline, read.metadata, read.trace) == (
        1896087600.5,
        {"k": "v"},
        (("traceparent", b"00-1"),),
    )


def test_read_job_holds_no_second_copy_of_the_prompt() -> None:
    """The worker holds the record's value for a dead letter, and counts its size once."""
    source = record({"request": {"model": "m", "messages": [{"role": "user", "content": "x" * 1_000_000}]}})
    tracemalloc.start()
    try:
        read = read_job(source)
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()

    assert isinstance(read, Job)
    assert len(bytes(memoryview(read.request["messages"]))) > 1_000_000
    assert held < 100_000


@pytest.mark.parametrize(
    ("deadline", "seconds"),
    [
        ("2030-01-31T12:00:00Z", 1896091200.0),
        ("2030-01-31t12:00:00z", 1896091200.0),
        ("2030-01-31 12:00:00-01:30", 1896096600.0),
        ("1969-12-31T23:59:59.25Z", -0.75),
        ("2030-01-31T12:00:00.123456789Z", 1896091200.123456),
    ],
)
def test_read_job_deadline_is_an_rfc_3339_time(deadline: str, seconds: float) -> None:
    """Any zone, any fraction, upper and lower case."""
    assert job({"request": REQUEST, "deadline": deadline}).deadline == seconds


@pytest.mark.parametrize(
    "deadline",
    [
        "2030-01-31",
        "2030-01-31T12:00:00",
        "2030-01-31T12:00Z",
        "20300131T120000Z",
        "2030-W05-4T12:00:00Z",
        "2030-02-30T12:00:00Z",
        "2030-01-31T25:00:00Z",
        "2030-01-31T12:00:00+25:00",
        "2030-01-31T12:00:00Z\n",
        "٢٠٣٠-01-31T12:00:00Z",
        "0000-01-01T00:00:00Z",
        "soon",
        "",
    ],
)
def test_read_job_deadline_of_another_kind_is_rejected(deadline: str) -> None:
    """Other formats that `fromisoformat` accepts are not deadlines."""
    assert faults({"request": REQUEST, "deadline": deadline}) == (
        "deadline: is not an RFC 3339 time with a zone, such as 2030-01-31T12:00:00Z",
    )


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ({"job_id": "a b"}, "job_id: holds other characters than A-Z a-z 0-9 . _ : -"),
        ({"job_id": "a\n"}, "job_id: holds other characters than A-Z a-z 0-9 . _ : -"),
        ({"job_id": "ü"}, "job_id: holds other characters than A-Z a-z 0-9 . _ : -"),
        ({"job_id": ""}, "job_id: expected `str` of length >= 1"),
        ({"job_id": "x" * 201}, "job_id: expected `str` of length <= 200"),
        ({"job_id": 5}, "job_id: expected `str`, got `int`"),
        ({"job_id": None}, "job_id: expected `str`, got `null`"),
        ({"upstream": ""}, "upstream: expected `str` of length >= 1"),
        ({"deadline": 5}, "deadline: expected `str`, got `int`"),
        ({"reply_to": []}, "reply_to: expected `str`, got `array`"),
        ({"reply_to": ""}, "reply_to: expected `str` of length >= 1"),
        ({"max_wait_s": -0.5}, "max_wait_s: expected `float` >= 0.0"),
        ({"max_wait_s": "1"}, "max_wait_s: expected `float`, got `str`"),
        ({"on_break": "retry"}, "on_break: expected 'fail' or 'restart'"),
        ({"deltas": "few"}, "deltas: expected 'live' or 'merged'"),
        ({"metadata": {"k": 5}}, "metadata: expected `str`, got `int` - at `$[...]`"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata: has 17 members, the limit is 16"),
        ({"reqest": 1}, "reqest: is not a member of a job"),
        ({"request": None}, "request: expected an object"),
        ({"request": []}, "request: expected an object"),
        ({"request": REQUEST | {"model": ""}}, "request.model: expected `str` of length >= 1"),
        ({"request": REQUEST | {"messages": []}}, "request.messages: expected `array` of length >= 1"),
        ({"request": REQUEST | {"messages": "hi"}}, "request.messages: expected `array`, got `str`"),
        ({"request": {"model": "m"}}, "request.messages: is required"),
        ({"request": {"messages": [1]}}, "request.model: is required"),
    ],
)
def test_read_job_with_a_fault_names_member_and_kind(members: dict[str, Any], told: str) -> None:
    """One sentence per fault, with the member's path and without its content."""
    assert faults({"request": REQUEST} | members) == (told,)


def test_read_job_with_many_faults_names_them_all_at_once() -> None:
    """The sender can fix all faults at once; the id is kept if it can be read."""
    rejection = read_job(
        record({"job_id": "mine", "on_break": 1, "x": 1, "request": {}}, (("tracestate", b"t"),))
    )

    assert rejection == Rejection(
        job_id="mine",
        source=AT,
        timestamp=1000,
        faults=(
            "x: is not a member of a job",
            "on_break: expected `str`, got `int`",
            "request.model: is required",
            "request.messages: is required",
        ),
        trace=(("tracestate", b"t"),),
    )


@pytest.mark.parametrize(
    "members",
    [
        {"max_wait_s": 0},
        {"metadata": {str(n): "" for n in range(16)}},
        {"job_id": "x" * 200},
        {"reply_to": "r"},
    ],
)
def test_read_job_at_a_limit_is_valid(members: dict[str, Any]) -> None:
    """A limit itself is allowed."""
    assert job({"request": REQUEST} | members).model == "m"


def test_read_job_rejected_keeps_its_reply_topic_if_that_can_be_read() -> None:
    """The rejection's event goes where the sender waits for it."""
    rejections = [
        read_job(record({"reply_to": reply_to, "request": {}})) for reply_to in ("replies", "", None, 5)
    ]

    assert [rejection.reply_to for rejection in rejections] == ["replies", None, None, None]


def test_read_job_without_request_reports_that_it_is_required() -> None:
    """An empty object has one fault."""
    assert faults({}) == ("request: is required",)


@pytest.mark.parametrize(
    ("members", "last"),
    [(MAX_FAULTS - 1, "request: is required"), (MAX_FAULTS, "and 1 more"), (999, "and 980 more")],
)
def test_read_job_with_very_many_faults_counts_the_rest(members: int, last: str) -> None:
    """A record may have any number of unknown members; a dead letter's header is bounded."""
    told = faults({f"member{n}": 1 for n in range(members)})

    assert len(told) == min(members + 1, MAX_FAULTS + 1)
    assert told[-1] == last


def test_read_job_unknown_member_with_a_long_name_is_named_by_its_beginning() -> None:
    """A name is text of the sender and may be as long as the record."""
    assert faults({"n" * 9999: 1, "request": REQUEST}) == ("n" * MAX_NAME + ": is not a member of a job",)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (b"", "the record is not JSON: Expecting value at character 0"),
        (b"hello", "the record is not JSON: Expecting value at character 0"),
        (b'{"request":', "the record is not JSON: Expecting value at character 11"),
        (b"[]", "the record is JSON, but not an object"),
        (b"null", "the record is JSON, but not an object"),
        (b'"\\ud83d"', "the record is JSON, but not an object"),
        (b'{"a":"\xff"}', "the record is not UTF-8 (byte 6)"),
        (b'{"a":' + b"[" * 99_999, "the record is nested too deeply"),
        (
            b'{"a":' + b"[" * 200 + b'"\\ud83d"' + b"]" * 200 + b"}",
            "the record is not JSON: nested too deeply",
        ),
        (
            b'{"a":' + b"[" * 600 + b'"\\ud83d"' + b"]" * 600 + b"}",
            "the record is not JSON: nested too deeply",
        ),
    ],
)
def test_read_job_that_is_not_an_object_is_rejected_with_one_fault(value: bytes, told: str) -> None:
    """The id is made of the record's coordinates."""
    rejection = read_job(record(value))

    assert isinstance(rejection, Rejection)
    assert (rejection.job_id, rejection.faults) == ("jobs-3-14", (told,))


def test_read_job_over_the_size_limit_is_not_parsed() -> None:
    """A record at the limit is read, a larger one is not."""
    value = msgspec.json.encode({"request": REQUEST})

    assert isinstance(read_job(record(value), max_bytes=len(value)), Job)
    assert faults(value, max_bytes=len(value) - 1) == (
        f"the record has {len(value)} bytes, the limit is {len(value) - 1}",
    )


def test_read_job_with_half_a_character_is_repaired() -> None:
    """JSON's grammar allows lone surrogates, UTF-8 does not: they become U+FFFD, the rest is unchanged."""
    read = job(b'{"request":{"model":"m","messages":["a\\ud83d", 123456789012345678901234567890, 1.50]}}')

    assert request_body(read, include_usage=False) == (
        '{"model":"m","messages":["a\ufffd",123456789012345678901234567890,1.5],"stream":true}'.encode()
    )


def test_read_job_request_nested_too_deeply_is_a_fault() -> None:
    """The record's decoder checks the nesting of raw members too."""
    value = b'{"request":{"model":"m","messages":[' + b"[" * 99_999 + b"]" * 99_999 + b"]}}"

    assert faults(value) == ("the record is nested too deeply",)


def test_read_job_of_a_tombstone_is_a_bug() -> None:
    """Callers skip null values before."""
    with pytest.raises(AssertionError):
        read_job(ConsumerRecord(AT, 0, None, None))


@pytest.mark.parametrize(
    ("value", "job_id"),
    [
        ({"job_id": "mine", "request": REQUEST}, "mine"),
        ({"job_id": "mine"}, "mine"),
        ({"job_id": "not mine", "request": REQUEST}, "jobs-3-14"),
        (b"{", "jobs-3-14"),
    ],
)
def test_job_id_of_record_is_the_one_its_events_carry(value: Any, job_id: str) -> None:
    """Valid or not, a record has one id."""
    assert job_id_of(record(value)) == job_id


def test_job_id_of_record_over_the_size_limit_is_made_of_its_coordinates() -> None:
    """The limit is that of the reader that reads the job: both find the same id."""
    value = msgspec.json.encode({"job_id": "mine", "request": REQUEST})

    assert job_id_of(record(value), max_bytes=len(value)) == "mine"
    assert job_id_of(record(value), max_bytes=len(value) - 1) == "jobs-3-14"


@pytest.mark.parametrize(
    ("include_usage", "options"),
    [(True, b',"stream_options":{"include_usage":true,"continuous_usage_stats":true}'), (False, b"")],
)
def test_request_body_with_continuous_usage_asks_for_running_totals(
    include_usage: bool, options: bytes
) -> None:
    """vLLM's option, which is only valid beside `include_usage`."""
    body = request_body(job({"request": REQUEST}), include_usage=include_usage, continuous_usage=True)

    assert body.partition(b',"stream":true')[2] == options + b"}"


@pytest.mark.parametrize(
    ("request_members", "include_usage", "body"),
    [
        ("", True, '{"model":"m","messages":[1],"stream":true,"stream_options":{"include_usage":true}}'),
        ("", False, '{"model":"m","messages":[1],"stream":true}'),
        (',"stream":false', False, '{"model":"m","messages":[1],"stream":true}'),
        (
            ',"stream_options":{"include_obfuscation":false,"include_usage":false}',
            True,
            '{"model":"m","messages":[1],"stream_options":{"include_obfuscation":false,"include_usage":true},"stream":true}',
        ),
        (',"stream_options":{"include_usage":true}', False, '{"model":"m","messages":[1],"stream":true}'),
        (
            ',"stream_options":null',
            True,
            '{"model":"m","messages":[1],"stream_options":{"include_usage":true},"stream":true}',
        ),
        (
            ',"x":{ "é":1.0e+2 ,"b":[1E400, 18446744073709551616]}',
            False,
            '{"model":"m","messages":[1],"x":{ "é":1.0e+2 ,"b":[1E400, 18446744073709551616]},"stream":true}',
        ),
    ],
)
def test_request_body_streams_and_leaves_the_rest_byte_for_byte(
    request_members: str, include_usage: bool, body: str
) -> None:
    """The worker sets `stream` and `stream_options.include_usage`; numbers, blanks and order are the
    sender's."""
    read = job(f'{{"request":{{"model":"m","messages":[1]{request_members}}}}}'.encode())

    assert request_body(read, include_usage=include_usage).decode() == body


@pytest.mark.parametrize(
    ("headers", "trace"),
    [
        ((), ()),
        ((("x", b"1"),), ()),
        (
            (("tracestate", b"s"), ("x", b""), ("traceparent", b"p")),
            (("tracestate", b"s"), ("traceparent", b"p")),
        ),
        ((("traceparent", b"1"), ("traceparent", b"2")), (("traceparent", b"2"),)),
        ((("Traceparent", b"1"),), ()),
        ((("traceparent", b""), ("tracestate", None)), ()),
        ((("traceparent", b"p"), ("tracestate", b"x" * 513)), (("traceparent", b"p"),)),
        ((("tracestate", b"x" * 512),), (("tracestate", b"x" * 512),)),
    ],
)
def test_trace_of_headers_is_the_last_of_each_name(headers: Headers, trace: Headers) -> None:
    """Only the two W3C headers, each once, if it has a value of at most 512 bytes."""
    assert trace_of(headers) == trace


@pytest.mark.parametrize(
    ("headers", "rerun"),
    [
        ((), False),
        ((("streamworker-rerun", b"1"),), True),
        ((("x", b"1"), ("streamworker-rerun", None)), True),
        ((("x", b"streamworker-rerun"), ("Streamworker-Rerun", b"1")), False),
    ],
)
def test_is_rerun_finds_the_header_by_its_name(headers: Headers, rerun: bool) -> None:
    """The header alone counts, whatever its value; `retry` and `dlq replay` write it."""
    assert is_rerun(headers) is rerun
