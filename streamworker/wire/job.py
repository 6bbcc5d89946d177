"""Job records: read a value as a `Job`, or as a `Rejection` that names every fault."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Annotated, Any, get_args

import msgspec

from streamworker.model import ConsumerRecord, Deltas, Headers, Job, OnBreak, Rejection
from streamworker.wire.json import InvalidJSON, decode, encode

__all__ = ["JOB_ID_PATTERN", "RERUN", "is_rerun", "job_id_of", "read_job", "request_body", "trace_of"]

JOB_ID_PATTERN = r"^[A-Za-z0-9._:-]{1,200}$"
MAX_METADATA = 16
MAX_FAULTS = 20
"""Faults that a rejection lists one by one. A record can have as many faults as members."""
MAX_NAME = 64
"""Characters of a member's name that a fault repeats. The name is text of the sender."""
RERUN = "streamworker-rerun"
"""Record header of a job that is submitted again on purpose: a new run under the same id."""
TRACE_HEADERS = ("traceparent", "tracestate")
MAX_TRACE_BYTES = 512
"""Limit for one trace-context header. W3C requires that 512 characters are propagated; larger headers would
make the job's events exceed the topic's record limit."""

_JOB_ID = re.compile(JOB_ID_PATTERN + r"\Z")
# RFC 3339 §5.6. `datetime.fromisoformat` alone also accepts week dates and times without a zone.
_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)\Z")

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _decoder(kind: Any) -> msgspec.json.Decoder[Any]:
    return msgspec.json.Decoder(kind)


_TEXT = _decoder(str)
_MEMBERS = {
    "job_id": _decoder(Annotated[str, msgspec.Meta(min_length=1, max_length=200)]),
    "upstream": _decoder(Annotated[str, msgspec.Meta(min_length=1)]),
    "deadline": _TEXT,
    "reply_to": _decoder(Annotated[str, msgspec.Meta(min_length=1)]),
    "on_break": _decoder(OnBreak),
    "deltas": _decoder(Deltas),
    "metadata": _decoder(dict[str, str]),
    "max_wait_s": _decoder(Annotated[float, msgspec.Meta(ge=0)]),
}
_WORDS = {"on_break": get_args(OnBreak), "deltas": get_args(Deltas)}
_REQUEST_MEMBERS = {
    "model": _decoder(Annotated[str, msgspec.Meta(min_length=1)]),
    "messages": _decoder(Annotated[list[msgspec.Raw], msgspec.Meta(min_length=1)]),
}


def read_job(record: ConsumerRecord, *, max_bytes: int = 1 << 20) -> Job | Rejection:
    """Read a job record that has a value. Faults name members and types, never their content."""
    assert record.value is not None, "a tombstone is not a job"
    default_id = str(record.at)
    try:
        members = _members(record.value, max_bytes)
    except _NotAnObject as fault:
        return _rejection(record, default_id, [str(fault)])
    faults = [
        f"{name[:MAX_NAME]}: is not a member of a job"
        for name in members
        if name not in _MEMBERS and name != "request"
    ]
    values = _read_members(members, faults)
    job_id = values.pop("job_id", default_id)
    model, request = _read_request(members.get("request"), faults)
    if faults:
        return _rejection(record, job_id, faults, values.get("reply_to"))
    return Job(
        job_id=job_id,
        source=record.at,
        timestamp=record.timestamp,
        model=model,
        request=request,
        trace=trace_of(record.headers),
        **values,
    )


def job_id_of(record: ConsumerRecord, *, max_bytes: int = 1 << 20) -> str:
    """Return the id that the events of the record's job carry, whether the job is valid or not."""
    job = read_job(record, max_bytes=max_bytes)
    return job.job_id


_TRUE = msgspec.Raw(b"true")


def request_body(job: Job, *, include_usage: bool, continuous_usage: bool = False) -> bytes:
    """Return the body of the upstream call: the job's request with streaming turned on, other members byte
    for byte."""
    members = {**job.request, "stream": _TRUE}
    if include_usage:
        wanted = {"include_usage": _TRUE} | ({"continuous_usage_stats": _TRUE} if continuous_usage else {})
        members["stream_options"] = _stream_options(job.request.get("stream_options"), wanted)
    else:
        members.pop("stream_options", None)
    return msgspec.json.encode(members)


def trace_of(headers: Headers) -> Headers:
    """Return the W3C trace-context headers of a record, the last one of each name."""
    found = {
        name: value
        for name, value in headers
        if name in TRACE_HEADERS and value and len(value) <= MAX_TRACE_BYTES
    }
    return tuple(found.items())


def is_rerun(headers: Headers) -> bool:
    """Return whether a job record with these headers asks for a new run under an id that was used before."""
    return any(name == RERUN for name, _ in headers)


class _NotAnObject(Exception):
    pass


def _rejection(
    record: ConsumerRecord, job_id: str, faults: list[str], reply_to: str | None = None
) -> Rejection:
    return Rejection(
        job_id=job_id,
        source=record.at,
        timestamp=record.timestamp,
        faults=_bounded(faults),
        reply_to=reply_to,
        trace=trace_of(record.headers),
    )


def _bounded(faults: list[str]) -> tuple[str, ...]:
    more = len(faults) - MAX_FAULTS
    return (*faults[:MAX_FAULTS], f"and {more} more") if more > 0 else tuple(faults)


def _members(value: bytes, max_bytes: int) -> dict[str, msgspec.Raw]:
    if len(value) > max_bytes:
        raise _NotAnObject(f"the record has {len(value)} bytes, the limit is {max_bytes}")
    try:
        value.decode()  # msgspec does not validate the encoding of raw members
        return _OBJECT.decode(value)
    except UnicodeDecodeError as error:
        raise _NotAnObject(f"the record is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _NotAnObject("the record is nested too deeply") from None
    except msgspec.ValidationError:
        raise _NotAnObject("the record is JSON, but not an object") from None
    except msgspec.DecodeError:
        return _repaired_members(value)


def _repaired_members(value: bytes) -> dict[str, msgspec.Raw]:
    """Read JSON that msgspec rejects because of lone surrogates, which become U+FFFD."""
    try:
        return _OBJECT.decode(encode(decode(value)))
    except InvalidJSON as error:
        raise _NotAnObject(f"the record is not JSON: {error}") from None
    except msgspec.ValidationError:
        raise _NotAnObject("the record is JSON, but not an object") from None


def _read_members(members: dict[str, msgspec.Raw], faults: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, decoder in _MEMBERS.items():
        if name in members:
            fault = _read(decoder, members[name], name, values) or _beyond_types(name, values)
            if fault:
                faults.append(fault)
    return values


def _read(
    decoder: msgspec.json.Decoder[Any], raw: msgspec.Raw, path: str, into: dict[str, Any]
) -> str | None:
    name = path.rpartition(".")[2]
    try:
        into[name] = decoder.decode(raw)
    except (ValueError, RecursionError) as error:
        return f"{path}: {_reason(error, name)}"
    return None


def _reason(error: Exception, name: str) -> str:
    """Return msgspec's reason without the value. Only its message about enum values repeats the value."""
    text = str(error)
    if text.startswith("Invalid enum value"):
        return "expected " + " or ".join(map(repr, _WORDS[name]))
    return text[:1].lower() + text[1:]


def _beyond_types(name: str, values: dict[str, Any]) -> str | None:
    """Check what a decoder's type cannot express. A value with a fault is removed from `values`."""
    value = values[name]
    fault = None
    match name:
        case "job_id" if not _JOB_ID.match(value):
            fault = "holds other characters than A-Z a-z 0-9 . _ : -"
        case "deadline":
            fault = _read_deadline(value, values)
        case "metadata" if len(value) > MAX_METADATA:
            fault = f"has {len(value)} members, the limit is {MAX_METADATA}"
    if fault is None:
        return None
    del values[name]
    return f"{name}: {fault}"


def _read_deadline(text: str, values: dict[str, Any]) -> str | None:
    try:
        values["deadline"] = datetime.fromisoformat(text.upper()).timestamp()
    except (ValueError, OverflowError):
        pass
    else:
        if _RFC3339.match(text):
            return None
    return "is not an RFC 3339 time with a zone, such as 2030-01-31T12:00:00Z"


def _read_request(raw: msgspec.Raw | None, faults: list[str]) -> tuple[str, dict[str, msgspec.Raw]]:
    if raw is None:
        faults.append("request: is required")
        return "", {}
    try:
        request = _OBJECT.decode(raw)
    except (msgspec.DecodeError, RecursionError):
        faults.append("request: expected an object")
        return "", {}
    values: dict[str, Any] = {}
    for name, decoder in _REQUEST_MEMBERS.items():
        path = f"request.{name}"
        fault = _read(decoder, request[name], path, values) if name in request else f"{path}: is required"
        if fault:
            faults.append(fault)
    # A Raw is a view of the record's value, which the worker holds for a dead letter: copies would hold the prompt twice.
    return values.get("model", ""), request


def _stream_options(raw: msgspec.Raw | None, wanted: dict[str, msgspec.Raw]) -> msgspec.Raw:
    try:
        options = dict(_OBJECT.decode(raw)) if raw is not None else {}
    except msgspec.DecodeError:
        options = {}
    return msgspec.Raw(msgspec.json.encode(options | wanted))
