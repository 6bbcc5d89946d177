"""What is fuzzed: functions of bytes. Each returns, or raises what its docstring documents; all else is a find."""

from __future__ import annotations

from streamworker.model import ConsumerRecord, Coordinates, Job
from streamworker.stream.provider_errors import http_error
from streamworker.text import RAW_TEXT_LIMIT
from streamworker.wire.control import read_control
from streamworker.wire.event import read_event
from streamworker.wire.job import read_job, request_body
from streamworker.wire.json import InvalidJSON, decode, encode
from tests.streams import bytewise, parse, play

__all__ = ["TARGETS"]

MAX_EVENT_BYTES = 4096


def event_stream(data: bytes) -> None:
    """Server-sent events, whole and byte after byte: the same."""
    whole = parse(data, max_event_bytes=MAX_EVENT_BYTES)
    assert parse(bytewise(data), max_event_bytes=MAX_EVENT_BYTES) == whole


def completion(data: bytes) -> None:
    """A completion's body, whole and byte after byte: the same deltas, and one terminal event that can be written."""
    whole = play(data, max_event_bytes=MAX_EVENT_BYTES)
    split = play(bytewise(data), max_event_bytes=MAX_EVENT_BYTES)
    assert encode(split.deltas) == encode(whole.deltas)
    assert encode(split.end)
    for name in ("status", "finish_reasons", "usage", "usage_source", "error", "seq"):
        assert getattr(split.end, name) == getattr(whole.end, name)


def job(data: bytes) -> None:
    """A job record: a job whose request is JSON that asks for a stream, or a rejection."""
    read = read_job(ConsumerRecord(Coordinates("jobs", 0, 0), 0, None, data))
    if isinstance(read, Job):
        assert decode(request_body(read, include_usage=True))["stream"] is True
    else:
        assert read.faults


def control(data: bytes) -> None:
    """A control record: a cancellation, or ValueError."""
    try:
        read_control(data)
    except ValueError:
        return


def event(data: bytes) -> None:
    """An event record, as readers read it: an event, or ValueError."""
    try:
        read_event(data)
    except ValueError:
        return


def error_body(data: bytes) -> None:
    """The body of an error status: an error, within its bounds."""
    error = http_error(500, data)
    assert len(error.message.encode()) <= RAW_TEXT_LIMIT
    assert len((error.upstream or "").encode()) <= RAW_TEXT_LIMIT


def json(data: bytes) -> None:
    """JSON text: what is read can be written, and is read the same again; or InvalidJSON."""
    try:
        value = decode(data)
    except InvalidJSON:
        return
    text = encode(value)
    assert encode(decode(text)) == text


TARGETS = {
    target.__name__: target for target in (event_stream, completion, job, control, event, error_body, json)
}
