"""Compare the schemas of records with the code: both accept the same jobs and describe the same events and headers."""

import json
import re
from collections.abc import Iterator
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker, ValidationError
from referencing import Registry, Resource
from referencing.jsonschema import DRAFT202012

from streamworker.config import TopicSettings
from streamworker.model import (
    Cause,
    ConsumerRecord,
    Coordinates,
    DeltaEvent,
    Deltas,
    ErrorCode,
    Event,
    Job,
    JobError,
    Observed,
    OnBreak,
    ProducerRecord,
    Result,
    Source,
    Started,
    Status,
    Timing,
    TopicPartition,
    UsageEvent,
    UsageSource,
)
from streamworker.stream.attempt import Attempt
from streamworker.stream.provider_errors import http_error
from streamworker.testing import MemoryObserver, MemorySink
from streamworker.text import UPSTREAM_TEXT_LIMIT
from streamworker.wire.deadletter import PREFIX, dead_letter
from streamworker.wire.event import EventWriter
from streamworker.wire.job import MAX_METADATA, RERUN, TRACE_HEADERS, read_job
from streamworker.wire.result import ResultWriter
from streamworker.worker.results import Results
from tests.streams import ended

SCHEMAS = Path(__file__).parents[2] / "schemas"
NAMES = ("job", "event", "control", "result")
AT = Coordinates("streamworker.jobs", 0, 7)


@cache
def schema(name: str) -> dict[str, Any]:
    content = json.loads((SCHEMAS / f"{name}.schema.json").read_text())
    assert isinstance(content, dict)
    return content


@cache
def asyncapi() -> dict[str, Any]:
    content = yaml.safe_load((SCHEMAS / "asyncapi.yaml").read_text())
    assert isinstance(content, dict)
    return content


FORMATS = FormatChecker(formats=())


@FORMATS.checks("date-time", raises=ValueError)  # type: ignore[untyped-decorator]
def is_date_time(text: object) -> bool:
    """Check the calendar date; the pattern of the schema checks the syntax."""
    if isinstance(text, str) and re.fullmatch(r"[0-9]{4}-.*[^\n]", text):
        datetime.fromisoformat(text.upper())
        return True
    return not isinstance(text, str)


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(schema(name), format_checker=FORMATS)


# The schemas themselves


@pytest.mark.parametrize("name", NAMES)
def test_schema_and_its_examples_are_valid(name: str) -> None:
    """Each schema is valid JSON Schema 2020-12 with an id, and accepts its own examples."""
    Draft202012Validator.check_schema(schema(name))
    assert schema(name)["$id"] == f"https://streamworker.dev/schemas/{name}/v1"
    assert schema(name)["examples"]
    for example in schema(name)["examples"]:
        validator(name).validate(example)


def test_every_definition_is_used() -> None:
    """No definition of the event schema is unused."""
    used = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema("event"))))
    assert set(schema("event")["$defs"]) == used


def enum(name: str) -> list[str]:
    values = schema("event")["$defs"][name]["enum"]
    assert isinstance(values, list)
    return values


def test_enums_equal_those_of_the_model() -> None:
    """The enums of the schemas have the values of the model, in their order."""
    assert enum("status") == [*Status]
    assert enum("error_code") == [*ErrorCode]
    assert enum("usage_source") == [*UsageSource]
    assert enum("cause") == [*get_args(Cause)]
    assert schema("job")["properties"]["on_break"]["enum"] == [*get_args(OnBreak)]
    assert schema("job")["properties"]["deltas"]["enum"] == [*get_args(Deltas)]


def test_limits_equal_those_of_the_code() -> None:
    """The schemas have the limits of metadata and error texts that the code applies."""
    assert schema("job")["properties"]["metadata"]["maxProperties"] == MAX_METADATA
    assert schema("event")["$defs"]["metadata"]["maxProperties"] == MAX_METADATA
    error = schema("event")["$defs"]["error"]["properties"]
    assert error["upstream"]["maxLength"] == UPSTREAM_TEXT_LIMIT


@pytest.mark.parametrize("kind", [Started, DeltaEvent, UsageEvent])
def test_event_schema_names_the_members_of_the_model(kind: type[Started | DeltaEvent | UsageEvent]) -> None:
    """Each event type has the members of its struct."""
    definitions = schema("event")["$defs"]
    own = definitions[kind.__struct_config__.tag]["allOf"][1]["properties"]
    fields = {field.encode_name for field in msgspec.structs.fields(kind)}
    assert set(own) | set(definitions["common"]["properties"]) == fields | {"type"}


@pytest.mark.parametrize(
    ("name", "kind"), [("error", JobError), ("observed", Observed), ("timing", Timing), ("source", Source)]
)
def test_nested_objects_name_the_members_of_the_model(name: str, kind: Any) -> None:
    """Each nested object has the members of its struct; those without a default are required."""
    definition = schema("event")["$defs"][name]
    required = [
        field.encode_name for field in msgspec.structs.fields(kind) if field.default is not msgspec.UNSET
    ]
    assert tuple(definition["properties"]) == kind.__struct_fields__
    assert definition["required"] == required


def test_result_schema_names_the_members_of_the_model_and_has_the_definitions_of_events() -> None:
    """A result has the members of its struct. The definitions that both schemas have are the same, but for the prose."""
    fields = {field.encode_name for field in msgspec.structs.fields(Result)}
    assert set(schema("result")["properties"]) == fields | {"type"}
    optional = {
        field.encode_name for field in msgspec.structs.fields(Result) if field.default is msgspec.UNSET
    }
    assert set(schema("result")["required"]) == fields - optional | {"type"}
    for name, definition in schema("result")["$defs"].items():
        told = {"description": schema("event")["$defs"][name].get("description")}
        assert definition | (told if told["description"] else {}) == schema("event")["$defs"][name]
    assert schema("result")["allOf"] == schema("event")["$defs"]["usage"]["allOf"][2:]


# Events that the code makes


def job(**members: Any) -> Job:
    given_members: dict[str, Any] = {"metadata": {"tenant": "acme"}, **members}
    return Job(job_id="j", source=AT, timestamp=900, model="m", request={}, **given_members)


def opened(**members: Any) -> Attempt:
    return Attempt(job(**members), attempt_id="a", upstream="default", cause="new", now_ms=1000)


def data(*payloads: Any) -> bytes:
    lines = (json.dumps(payload) if not isinstance(payload, str) else payload for payload in payloads)
    return "".join(f"data: {line}\n\n" for line in lines).encode()


def chunk(*choices: dict[str, Any], **members: Any) -> dict[str, Any]:
    return {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": list(choices), **members}


def text(content: str | None, index: int = 0, finish: str | None = None, **members: Any) -> dict[str, Any]:
    return {"index": index, "delta": {"content": content}, "finish_reason": finish, **members}


CALL = {"index": 0, "id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a":'}}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "prompt_tokens_details": None}
STREAMS = {
    "completed": data(
        chunk(text("Hi")), chunk(text(" \U0001f600", finish="stop")), chunk(usage=USAGE), "[DONE]"
    ),
    "two choices": data(
        chunk(text("a", 1), text("b", 0)), chunk(text("", 0, "stop"), text(None, 1, "length")), "[DONE]"
    ),
    "tool calls": data(
        chunk({"index": 0, "delta": {"role": "assistant", "tool_calls": [CALL]}}),
        chunk({"index": 0, "delta": {}, "finish_reason": "tool_calls"}),
        "[DONE]",
    ),
    "reasoning and logprobs": data(
        chunk({"delta": {"reasoning_content": "hm"}, "logprobs": {"content": []}, "stop_reason": None}),
        "[DONE]",
    ),
    "unknown members without choices": data(
        chunk(prompt_filter_results=[{}]), chunk(text("x", finish="stop"), x_groq={"id": 1}), "[DONE]"
    ),
    "negative choice": data(chunk(text("x", -1, "stop")), "[DONE]"),
    "half a character": b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\ndata: [DONE]\n\n',
    "nothing but the end": data("[DONE]"),
    "usage and then a break": data(chunk(text("x"), usage=USAGE)),
    "truncated": data(chunk(text("x"))),
    "truncated before any delta": data(chunk()),
    "error frame": data(chunk(text("x")), {"error": {"message": "boom sk-0123456789abcdef", "code": 503}}),
    "error frame first": data({"error": {"message": "no", "type": "invalid_request_error"}}),
    "long error frame": data({"error": {"message": "é" * 5000}}),
    "no JSON": data(chunk(text("x")), "{oops"),
    "bad choices": data({"id": "c", "choices": "x"}),
    "empty": b"",
}


def streamed(stream: bytes) -> Iterator[Event]:
    attempt = opened()
    yield attempt.started()
    attempt.call()
    attempt.answer()
    yield from attempt.receive(stream, 1100)
    if attempt.is_listening:
        yield from attempt.close(1200)
    yield ended(attempt, 1300)


def ended_by(end: str, *, streaming: bool) -> list[Event]:
    attempt = opened()
    events: list[Event] = [attempt.started()]
    attempt.call()
    if streaming:
        attempt.answer()
        events += attempt.receive(data(chunk(text("x"))), 1100)
    match end:
        case "cancel":
            attempt.cancel("")
        case "expire":
            attempt.expire()
        case "status":
            attempt.fail(http_error(429, b'{"error":{"message":"slow down","code":"rate_limit_exceeded"}}'))
    return [*events, ended(attempt, 900)]  # a clock that was set back


def rejected() -> UsageEvent:
    return UsageEvent(
        job_id=str(AT),
        attempt="a",
        seq=0,
        ts=1,
        status=Status.REJECTED,
        finish_reasons={},
        usage=None,
        usage_source=UsageSource.NONE,
        observed=Observed(),
        error=JobError(ErrorCode.INVALID_JOB, "request: is required"),
        timing=Timing(queued=0, first_delta=None, total=0),
        tries=0,
        metadata={},
    )


def record(event: Event, *, cloud_source: str | None = None) -> ProducerRecord:
    trace = tuple((name, b"x") for name in TRACE_HEADERS)
    return EventWriter(cloud_source=cloud_source).write(event, TopicPartition("e", 0), b"j", trace)


def check(events: list[Event]) -> list[dict[str, Any]]:
    values: list[dict[str, Any]] = [json.loads(record(event).value or b"") for event in events]
    for value in values:
        validator("event").validate(value)
        kind = schema("event")["$defs"][value["type"]]
        Draft202012Validator({**kind, "$defs": schema("event")["$defs"]}).validate(value)
    return values


@pytest.mark.parametrize("name", STREAMS)
def test_events_of_a_stream_are_valid(name: str) -> None:
    """The events of each stream are valid and numbered without a gap."""
    values = check([*streamed(STREAMS[name])])
    assert [value["seq"] for value in values] == list(range(len(values)))
    assert [values[0]["type"], values[-1]["type"]] == ["started", "usage"]


def test_streams_reach_every_kind_of_ending() -> None:
    """Together the streams have every status, usage source and error code that a stream can end with."""
    lasts = [[*streamed(stream)][-1] for stream in STREAMS.values()]
    ends = [last for last in lasts if isinstance(last, UsageEvent)]
    assert {end.status for end in ends} == {Status.COMPLETED, Status.INTERRUPTED, Status.FAILED}
    assert {end.usage_source for end in ends} == {*UsageSource}
    codes = {end.error.code for end in ends if end.error}
    assert codes == {ErrorCode.TRUNCATED, ErrorCode.UPSTREAM_ERROR, ErrorCode.UPSTREAM_PROTOCOL}


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("end", ["cancel", "expire", "status"])
def test_events_of_an_ended_attempt_are_valid(end: str, streaming: bool) -> None:
    """The events of a cancelled, expired or failed attempt are valid, even if the clock was set back."""
    assert check(ended_by(end, streaming=streaming))[-1]["error"] is not None


def test_other_endings_and_beginnings_are_valid() -> None:
    """Rejections, refused deltas and restarts have valid events."""
    check([rejected()])
    attempt = opened()
    attempt.call()
    attempt.answer()
    assert len([*attempt.receive(STREAMS["completed"], 1100)]) == 2
    attempt.refuse(JobError(ErrorCode.TOO_LARGE, "a delta over the record limit"))
    assert check([attempt.terminal(1300)])[0]["status"] == "interrupted"
    attempt = Attempt(job(metadata={}), attempt_id="b", upstream="u", cause="restart", now_ms=1)
    assert check([attempt.started()])[0]["cause"] == "restart"


BREAKAGES: dict[str, dict[str, Any]] = {
    "no job id": {"job_id": None},
    "another version": {"v": 2},
    "a negative seq": {"seq": -1},
    "an unknown status": {"status": "done"},
    "an error although completed": {"error": msgspec.to_builtins(JobError(ErrorCode.AUTH, "x"))},
    "no error although failed": {"status": "failed"},
    "an unknown code": {"status": "failed", "error": {"code": "x", "message": "x"}},
    "usage from nowhere": {"usage_source": "none"},
    "no usage": {"usage": None},
    "an estimate without its method": {"usage_source": "estimated"},
    "a method without an estimate": {"estimate_method": "guess"},
    "a reason that is null": {"finish_reasons": {"0": None}},
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_terminal_event_with_a_fault_is_refused(breakage: str) -> None:
    """The schema refuses each of the invalid terminal events."""
    last = check([*streamed(STREAMS["completed"])])[-1]
    with pytest.raises(ValidationError):
        validator("event").validate({**last, **BREAKAGES[breakage]})


@pytest.mark.parametrize("name", ["started", "delta", "usage"])
def test_every_member_is_required_unless_it_may_be_absent(name: str) -> None:
    """An event without one of its required members is invalid."""
    may_be_absent = {"logprobs", "chunk", "extra", "estimate_method"}
    values = {value["type"]: value for value in check([*streamed(STREAMS["completed"])])}
    for member in set(values[name]) - may_be_absent - {"type"}:
        value = {other: values[name][other] for other in values[name] if other != member}
        assert not validator("event").is_valid(value), member


def test_unknown_types_and_members_are_valid() -> None:
    """An event of an unknown type needs only the common members, and known types may have further members."""
    last = check([*streamed(STREAMS["completed"])])[-1]
    validator("event").validate({**last, "new": 1, "observed": {**last["observed"], "new": 1}})
    common = schema("event")["$defs"]["common"]["required"]
    validator("event").validate({**{name: last[name] for name in common}, "type": "progress"})


# Jobs: the schema and the reader agree

VALID_JOBS = st.fixed_dictionaries(
    {
        "request": st.fixed_dictionaries(
            {
                "model": st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5),
                "messages": st.lists(
                    st.sampled_from([{"role": "user", "content": "x"}, None, 1]), min_size=1
                ),
            },
            optional={"stream": st.booleans(), "temperature": st.floats(0, 2), "n": st.integers()},
        )
    },
    optional={
        "job_id": st.text("Ab0._:-", min_size=1, max_size=200),
        "upstream": st.sampled_from(["default", "é"]),
        "deadline": st.sampled_from(
            [
                "2030-01-31T12:00:00Z",
                "2030-01-31t12:00:00.5z",
                "2024-02-29T23:59:59.123456789+23:59",
                "1969-01-01T00:00:00-00:00",
            ]
        ),
        "reply_to": st.just("replies"),
        "on_break": st.sampled_from(get_args(OnBreak)),
        "deltas": st.sampled_from(get_args(Deltas)),
        "metadata": st.dictionaries(st.sampled_from("abcdefgh"), st.text("xé"), max_size=8),
    },
)
DEADLINES = [
    "",
    "soon",
    "2030-01-31",
    "2030-01-31T12:00:00",
    "2030-01-31T12:00Z",
    "2030-02-30T12:00:00Z",
    "2030-01-31T12:60:00Z",
    "2030-01-31T25:00:00Z",
    "2030-01-31T12:00:00+24:00",
    "2030-01-31T12:00:00.Z",
    "2030-01-31T12:00:00Z\n",
    "2030-W05-4T12:00:00Z",
    "20300131T120000Z",
    "\u0662030-01-31T12:00:00Z",
    "2016-12-31T23:59:60Z",
    "0000-01-01T00:00:00Z",
]
ANYTHING: st.SearchStrategy[Any] = st.sampled_from(
    [
        None,
        True,
        0,
        1.5,
        "",
        "x",
        "fail",
        "a\n",
        "a b",
        "é",
        "x" * 200,
        "x" * 201,
        [],
        [1],
        {},
        {"a": "b"},
        {"a": 1},
        {str(n): "" for n in range(16)},
        {str(n): "" for n in range(17)},
        {"model": "m", "messages": [1]},
    ]
)
PATHS = [*({(name,) for name in schema("job")["properties"]}), ("reqest",), ("request", "model")]
PATHS += [("request", "messages"), ("request", "unknown")]


@st.composite
def mutated_jobs(draw: st.DrawFn) -> Any:
    value = draw(VALID_JOBS)
    for path in draw(st.lists(st.sampled_from(sorted(PATHS)), min_size=1, max_size=2)):
        place: Any = value
        for name in path[:-1]:
            place = place.get(name)
        if not isinstance(place, dict):
            continue
        if draw(st.booleans()):
            place.pop(path[-1], None)
        else:
            more = st.sampled_from(DEADLINES) if path == ("deadline",) else ANYTHING
            place[path[-1]] = draw(more | ANYTHING)
    return value


def is_accepted(value: Any) -> bool:
    record = ConsumerRecord(AT, 0, None, json.dumps(value).encode())
    return isinstance(read_job(record), Job)


@settings(deadline=None)
@given(VALID_JOBS)
def test_valid_job_is_accepted_by_schema_and_reader(value: Any) -> None:
    """Schema and reader accept every valid job."""
    validator("job").validate(value)
    assert is_accepted(value)


@settings(deadline=None)
@given(mutated_jobs() | ANYTHING)
def test_any_value_is_accepted_by_schema_and_reader_or_by_neither(value: Any) -> None:
    """Schema and reader accept and refuse the same values."""
    assert validator("job").is_valid(value) == is_accepted(value)


@pytest.mark.parametrize("deadline", DEADLINES)
def test_invalid_deadline_is_refused_by_schema_and_reader(deadline: str) -> None:
    """Schema and reader refuse each invalid deadline."""
    value = {"request": {"model": "m", "messages": [1]}, "deadline": deadline}
    assert (validator("job").is_valid(value), is_accepted(value)) == (False, False)


@pytest.mark.parametrize(
    ("value", "valid"),
    [
        ({"v": 1, "type": "cancel", "job_id": "j"}, True),
        ({"v": 1, "type": "cancel", "job_id": "j", "reason": "r", "new": 1}, True),
        ({"v": 1, "type": "pause", "job_id": "j"}, True),
        ({"v": 1, "type": "cancel"}, False),
        ({"v": 1, "type": "cancel", "job_id": ""}, False),
        ({"v": 1, "type": "cancel", "job_id": "j", "reason": 1}, False),
        ({"type": "cancel", "job_id": "j"}, False),
    ],
)
def test_control_record_is_judged_by_its_common_members(value: dict[str, Any], valid: bool) -> None:
    """The schema accepts commands of every type, and refuses a missing id and wrong types."""
    assert validator("control").is_valid(value) == valid


# AsyncAPI

BASE = "file:///asyncapi.yaml"


def registry() -> Registry[Any]:
    document = Resource.opaque(asyncapi())
    files = [(f"file:///{name}.schema.json", DRAFT202012.create_resource(schema(name))) for name in NAMES]
    return Registry().with_resources([(BASE, document), *files])


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        for item in node.values():
            yield from references(item)
    elif isinstance(node, list):
        for item in node:
            yield from references(item)


def resolved(node: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in node:
        node = registry().resolver(BASE).lookup(node["$ref"]).contents
    return node


def message(name: str) -> dict[str, Any]:
    return resolved(asyncapi()["components"]["messages"][name])


def test_every_reference_resolves_and_every_schema_file_is_used() -> None:
    """The AsyncAPI document has no broken reference and uses all schema files."""
    found = set(references(asyncapi()))
    for reference in found:
        registry().resolver(BASE).lookup(reference)
    files = {reference.partition("#")[0] for reference in found} - {""}
    assert files == {f"{name}.schema.json" for name in NAMES}


def test_channels_are_the_default_topics() -> None:
    """The addresses of the channels are the default topic names."""
    topics = TopicSettings()
    addresses = {name: channel["address"] for name, channel in asyncapi()["channels"].items()}
    assert addresses == {
        "jobs": topics.jobs[0],
        "events": topics.events,
        "control": topics.control,
        "results": "streamworker.results",  # the usual name; there is no results topic by default
        "dlq": topics.dlq,
    }


def test_operations_are_those_of_the_worker() -> None:
    """The worker receives jobs and control records, and sends events, results and dead letters."""
    actions = {
        operation["channel"]["$ref"].rpartition("/")[2]: operation["action"]
        for operation in asyncapi()["operations"].values()
    }
    sent = dict.fromkeys(("events", "results", "dlq"), "send")
    assert actions == {"jobs": "receive", "control": "receive"} | sent


def test_operations_have_all_messages_of_their_channels() -> None:
    """Each operation has the messages of its channel."""
    for operation in asyncapi()["operations"].values():
        channel = resolved(operation["channel"])
        assert [resolved(ref) for ref in operation["messages"]] == [
            *map(resolved, channel["messages"].values())
        ]


def test_messages_of_the_events_channel_are_the_event_types() -> None:
    """The events channel has a message for each event type, with its schema."""
    tags = [kind.__struct_config__.tag for kind in get_args(Event)]
    assert [*asyncapi()["channels"]["events"]["messages"]] == tags
    payloads = [message(str(tag))["payload"]["schema"]["$ref"] for tag in tags]
    assert payloads == [f"event.schema.json#/$defs/{tag}" for tag in tags]


@pytest.mark.parametrize("event", [*streamed(STREAMS["completed"])], ids=lambda event: type(event).__name__)
def test_event_headers_equal_the_written_ones(event: Event) -> None:
    """The described headers are those of the written record, with and without CloudEvents."""
    plain = dict(record(event).headers)
    cloud = {name: (value or b"").decode() for name, value in record(event, cloud_source="/g").headers}
    described = message(cloud["streamworker-type"])["headers"]
    assert [*described["properties"]] == [*cloud]
    assert described["required"] == [name for name in plain if name not in TRACE_HEADERS]
    for name, value in cloud.items():
        Draft202012Validator(resolved(described["properties"][name])).validate(value)


@pytest.mark.parametrize("cloud_source", [None, "/g"])
@pytest.mark.parametrize("status", Status)
def test_written_result_is_as_described(status: Status, cloud_source: str | None) -> None:
    """Value and headers of a written result agree with the schema and the AsyncAPI document."""
    terminal = UsageEvent(
        job_id="j",
        attempt="a",
        seq=3,
        ts=5,
        status=status,
        finish_reasons={"0": "stop"},
        usage=None,
        usage_source=UsageSource.NONE,
        observed=Observed(),
        error=None if status is Status.COMPLETED else JobError(ErrorCode.CANCELLED, "m"),
        timing=Timing(queued=None, first_delta=None, total=0),
        tries=1,
        metadata={},
    )
    sink, observer = MemorySink(), MemoryObserver()
    writer = ResultWriter(cloud_source=cloud_source)
    results = Results(sink, writer, observer, topic="results", limit_bytes=100_000)
    trace = ((TRACE_HEADERS[0], b"00"), (TRACE_HEADERS[1], b"x=1"))
    record, _ = results.write(terminal, AT, model="m", upstream=None, started=AT, trace=trace)
    assert (record.topic_partition.topic, record.key) == ("results", b"j")
    validator("result").validate(json.loads(record.value or b""))
    headers = {name: (value or b"").decode() for name, value in record.headers}
    described = message("result")["headers"]
    assert set(described["required"]) <= set(headers)
    if cloud_source:
        assert [*described["properties"]] == [*headers]
        assert headers["ce_id"] == "j/a/result"
    for name, value in headers.items():
        if name not in TRACE_HEADERS:
            Draft202012Validator(resolved(described["properties"][name])).validate(value)


def test_job_headers_are_the_propagated_ones_and_that_of_a_new_run() -> None:
    """The described job headers are those that the worker propagates, and the one that `retry` writes."""
    assert tuple(message("job")["headers"]["properties"]) == (*TRACE_HEADERS, RERUN)


def test_dead_letter_headers_equal_the_written_ones() -> None:
    """The described headers of a dead letter are those that the worker adds."""
    letter = dead_letter(
        ConsumerRecord(AT, 5, b"k", b"v"),
        TopicPartition("d", 0),
        code=ErrorCode.INVALID_JOB,
        message="m",
        group="g",
    )
    described = message("deadLetter")["headers"]
    assert [*described["properties"]] == described["required"] == [name for name, _ in letter.headers]
    assert all(name.startswith(PREFIX) for name in described["properties"])
    for name, value in letter.headers:
        Draft202012Validator(resolved(described["properties"][name])).validate((value or b"").decode())
