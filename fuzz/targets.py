"""The fuzz targets: functions of bytes. Any exception that the docstring does not name is a failure."""

from __future__ import annotations

from fuzz.http1 import http_response
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
    """Parse server-sent events whole and byte by byte: the results are equal."""
    whole = parse(data, max_event_bytes=MAX_EVENT_BYTES)
    assert parse(bytewise(data), max_event_bytes=MAX_EVENT_BYTES) == whole


def completion(data: bytes) -> None:
    """Read a completion's body whole and byte by byte: the same deltas, and one terminal event that can be encoded."""
    whole = play(data, max_event_bytes=MAX_EVENT_BYTES)
    split = play(bytewise(data), max_event_bytes=MAX_EVENT_BYTES)
    assert encode(split.deltas) == encode(whole.deltas)
    assert encode(split.end)
    for name in ("status", "finish_reasons", "usage", "usage_source", "error", "seq"):
        assert getattr(split.end, name) == getattr(whole.end, name)


def job(data: bytes) -> None:
    """Read a job record: a job whose request is JSON and has `stream`, or a rejection."""
    read = read_job(ConsumerRecord(Coordinates("jobs", 0, 0), 0, None, data))
    if isinstance(read, Job):
        assert decode(request_body(read, include_usage=True))["stream"] is True
    else:
        assert read.faults


def control(data: bytes) -> None:
    """Read a control record: a cancellation, or ValueError."""
    try:
        read_control(data)
    except ValueError:
        return


def event(data: bytes) -> None:
    """Read an event record: an event, or ValueError."""
    try:
        read_event(data)
    except ValueError:
        return


def error_body(data: bytes) -> None:
    """Read the body of an error response: an error within its bounds."""
    error = http_error(500, data)
    assert len(error.message.encode()) <= RAW_TEXT_LIMIT
    assert len((error.upstream or "").encode()) <= RAW_TEXT_LIMIT


def json(data: bytes) -> None:
    """Decode JSON: the value can be encoded and decoded again without a change; or InvalidJSON."""
    try:
        value = decode(data)
    except InvalidJSON:
        return
    text = encode(value)
    assert encode(decode(text)) == text


TARGETS = {
    target.__name__: target
    for target in (event_stream, completion, job, control, event, error_body, json, http_response)
}
