"""The lines of the output files, in the shapes of the OpenAI Batch API.

`docs/batch.md` describes both shapes. U+0085, U+2028 and U+2029 are escaped, because many readers take them for the ends
of lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from streamworker.batch.identity import output_id
from streamworker.wire.json import InvalidJSON, decode, encode

if TYPE_CHECKING:
    from streamworker.batch.lines import Fault

__all__ = [
    "EndedJob",
    "error_line",
    "fault_line",
    "is_completed",
    "local_error_line",
    "output_line",
    "read_result",
]

EXPIRED = "This request could not be executed before the completion window expired."
CANCELLED = "This request was cancelled before it ended."

_LINE_ENDS = ((b"\xc2\x85", b"\\u0085"), (b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"))


class Place(msgspec.Struct, frozen=True, gc=False):
    """Coordinates of a record."""

    topic: str
    partition: int
    offset: int


class EndedJob(msgspec.Struct, kw_only=True):
    """What an output line is made of: the members of a result, or of a terminal event and the completion of its events.

    `completion` is JSON text.
    """

    job_id: str
    attempt: str
    status: str
    usage_source: str
    usage: Any = None
    error: dict[str, Any] | None = None
    metadata: dict[str, str] = {}
    completion: msgspec.Raw = msgspec.Raw(b"null")
    omitted: list[str] = []
    events: Place | None = None


_RESULT = msgspec.json.Decoder(EndedJob)


def read_result(value: bytes) -> EndedJob:
    """Read a result record. Raises ValueError."""
    try:
        return _RESULT.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from None


def is_completed(job: EndedJob) -> bool:
    """Whether the job's line belongs into OUTPUT."""
    return job.status == "completed" and bytes(job.completion) != b"null"


def output_line(digest: bytes, custom_id: str, job: EndedJob) -> bytes:
    """Return the line of a completed job, with its LF."""
    return _escaped(
        b'{"id":"%b","custom_id":%b,"response":{"status_code":200,"request_id":%b,"body":%b},"error":null}\n'
        % (output_id(digest).encode(), encode(custom_id), encode(job.attempt), bytes(job.completion))
    )


def error_line(digest: bytes, custom_id: str, job: EndedJob) -> tuple[bytes, str]:
    """Return the line of a job with another status, with its LF, and its error's code."""
    error = job.error or {"code": job.status, "message": f"the job ended with status {job.status}"}
    line: dict[str, Any] = {
        "id": output_id(digest),
        "custom_id": custom_id,
        "response": _response(job.attempt, error),
    }
    line["error"] = _error_of(job, error)
    code = line["error"]["code"]
    if bytes(job.completion) != b"null":
        line["partial"] = job.completion
    if job.usage is not None:
        line["usage"] = job.usage
    line["usage_source"] = job.usage_source
    return _line(line), code


def local_error_line(
    digest: bytes, custom_id: str | None, code: str, message: str, *, retriable: bool = False
) -> bytes:
    """Return the line of a request that has no job, or whose job's ending is not awaited any more, with its LF."""
    error = {"code": code, "message": message, "retriable": retriable}
    return _line({"id": output_id(digest), "custom_id": custom_id, "response": None, "error": error})


def fault_line(digest: bytes, fault: Fault, number: int) -> bytes:
    """Return the line for a faulty line of the input, with its LF. `number` is in it if it has no custom id."""
    line: dict[str, Any] = {"id": output_id(digest), "custom_id": fault.custom_id, "response": None}
    line["error"] = {"code": fault.code.code, "message": fault.message, "retriable": False}
    if fault.custom_id is None:
        line["line"] = number
    return _line(line)


def _error_of(job: EndedJob, error: dict[str, Any]) -> dict[str, Any]:
    code, message = str(error.get("code") or job.status), str(error.get("message") or "")
    if job.status == "expired":
        code, message = "batch_expired", EXPIRED
    elif job.status == "cancelled":
        code, message = "batch_cancelled", message or CANCELLED
    elif job.status == "completed":
        code = "completion_omitted"
        message = "the completion exceeds kafka.max_result_bytes, and its events are deleted: raise the limit"
    return {"code": code, "message": message or code, "retriable": bool(error.get("retriable"))}


def _response(attempt: str, error: dict[str, Any]) -> dict[str, Any] | None:
    """Return the HTTP response if the upstream answered with an HTTP error."""
    status = error.get("http_status")
    if type(status) is not int or status < 400:
        return None
    ours = {
        "message": str(error.get("message") or ""),
        "type": str(error.get("code")),
        "param": None,
        "code": None,
    }
    return {"status_code": status, "request_id": attempt, "body": {"error": ours | _upstream_error(error)}}


def _upstream_error(error: dict[str, Any]) -> dict[str, Any]:
    """Return the error object that the upstream sent; empty if it sent none, or text that was cut."""
    try:
        body = decode(str(error.get("upstream") or "").encode())
    except InvalidJSON:
        return {}
    sent = body.get("error") if type(body) is dict else None
    return sent if type(sent) is dict else {}


def _line(line: dict[str, Any]) -> bytes:
    return _escaped(encode(line) + b"\n")


def _escaped(line: bytes) -> bytes:
    for character, escape in _LINE_ENDS:
        if character in line:
            line = line.replace(character, escape)
    return line
