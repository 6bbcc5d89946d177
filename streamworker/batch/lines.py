"""Read a batch file: bytes to lines, a line to a request or to a fault.

A line is an object of the OpenAI Batch format: `{"custom_id", "method", "url", "body"}`. `method` and `url` may be absent,
as Mistral, Together and Novita leave them out. Lines end with LF only: U+2028 and the like may be inside of strings.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from streamworker.batch.identity import digest_of
from streamworker.wire.json import InvalidJSON, decode, decode_strict, encode

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "MAX_CUSTOM_ID_BYTES",
    "MAX_LINE_BYTES",
    "URL",
    "Fault",
    "FaultCode",
    "LineSplitter",
    "RawLine",
    "Request",
    "read_line",
]

MAX_CUSTOM_ID_BYTES = 1024
MAX_LINE_BYTES = 64 << 20
"""Bytes of a line that are kept. The rest of a longer line is skipped, and the line is a fault."""

URL = "/v1/chat/completions"

_BOM = b"\xef\xbb\xbf"
_WHITESPACE = b" \t\r"
_DECODER = msgspec.json.Decoder(dict[str, msgspec.Raw])


class FaultCode(IntEnum):
    """Why a line cannot be submitted. `name.lower()` is the code that files and messages contain."""

    INVALID_JSON_LINE = 1
    MISSING_CUSTOM_ID = 2
    DUPLICATE_CUSTOM_ID = 3
    INVALID_METHOD = 4
    INVALID_URL = 5
    INVALID_BODY = 6
    STREAM_NOT_SUPPORTED = 7
    TOO_LARGE = 8

    @property
    def code(self) -> str:
        """The code in files and messages."""
        return self.name.lower()


class Fault(NamedTuple):
    """Why a line is not valid. `custom_id` is None if the line has none that can be read."""

    code: FaultCode
    message: str
    custom_id: str | None = None


class Request(NamedTuple):
    """A valid line. `body` is the JSON text of the chat-completions body, `digest` has 16 bytes."""

    custom_id: str
    model: str
    body: bytes
    digest: bytes


class RawLine(NamedTuple):
    """A line that is not blank. `number` counts from 1; `offset` and `length`, without the LF, are in bytes.

    `text` is None if the line is longer than `MAX_LINE_BYTES`.
    """

    number: int
    offset: int
    length: int
    text: bytes | None


class LineSplitter:
    """Splits chunks of a file into lines. Skips blank lines and a byte order mark at the start."""

    def __init__(self, *, max_line_bytes: int = MAX_LINE_BYTES) -> None:
        self._max = max_line_bytes
        self._number = 0
        self._offset = 0  # of the line's first byte
        self._length = 0  # of the line so far, if it spans chunks
        self._parts: list[bytes] = []
        self._kept = 0

    def feed(self, chunk: bytes) -> Iterator[RawLine]:
        """Yield the lines that end in this chunk. Exhaust the iterator before the next call."""
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            yield from self._line(chunk[start:end])
            start = end + 1
            self._offset += self._length + 1
            self._length = self._kept = 0
        self._keep(chunk[start:])

    def finish(self) -> Iterator[RawLine]:
        """Yield the last line if no LF follows it."""
        if self._length:
            yield from self._line(b"")

    def _keep(self, part: bytes) -> None:
        self._length += len(part)
        if self._kept <= self._max:
            self._parts.append(part)
            self._kept += len(part)

    def _line(self, last: bytes) -> Iterator[RawLine]:
        self._keep(last)
        self._number += 1
        text = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts.clear()
        if self._length > self._max:
            yield RawLine(self._number, self._offset, self._length, None)
            return
        offset = self._offset
        if self._number == 1 and text.startswith(_BOM):
            text, offset = text[len(_BOM) :], offset + len(_BOM)
        if text.strip(_WHITESPACE):
            yield RawLine(self._number, offset, len(text), text)


def read_line(text: bytes | None) -> Request | Fault:
    """Read one line. None stands for a line that is too long to be kept."""
    if text is None:
        return Fault(FaultCode.TOO_LARGE, f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        line, raw = _decoded(text)
    except InvalidJSON as error:
        return Fault(FaultCode.INVALID_JSON_LINE, _reason(text, str(error)))
    if type(line) is not dict:
        return Fault(FaultCode.INVALID_JSON_LINE, _reason(text, "it is not an object"))
    custom_id = line.get("custom_id")
    if (unnamed := _fault_of_name(custom_id)) is not None:
        return unnamed
    if (found := _fault_of_head(line) or _fault_of_body(line)) is not None:
        return Fault(*found, custom_id)
    body = line["body"]
    return Request(str(custom_id), body["model"], raw, digest_of(str(custom_id), body))


def _decoded(text: bytes) -> tuple[Any, bytes]:
    """Return the decoded line and the JSON text of its body. Raises InvalidJSON."""
    try:
        line = decode_strict(text)
    except InvalidJSON:
        return _decoded_slowly(text)
    if type(line) is not dict or "body" not in line:
        return line, b""
    return line, bytes(_DECODER.decode(text)["body"])


def _decoded_slowly(text: bytes) -> tuple[Any, bytes]:
    """Decode a line with lone surrogates in escapes, which JSON allows; they become U+FFFD in the job."""
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise InvalidJSON(f"byte {error.start} is not valid UTF-8") from None
    line = decode(text)
    if type(line) is not dict or "body" not in line:
        return line, b""
    clean = decode_strict(encode(line))
    return clean, encode(clean["body"])


def _reason(text: bytes, reason: str) -> str:
    if text[:2] in {b"\xff\xfe", b"\xfe\xff"}:
        return "the file is UTF-16; convert it to UTF-8"
    if text[:2] == b"\x1f\x8b" or text[:4] == b"\x28\xb5\x2f\xfd":
        return "the file is compressed; decompress it, as in `zcat FILE | streamworker batch - -o OUTPUT`"
    if text.lstrip()[:1] == b"[":
        return "the file is a JSON array, or the line is; a batch file has one object per line"
    return f"the line is not JSON: {reason}"


def _fault_of_name(custom_id: Any) -> Fault | None:
    if type(custom_id) is not str or not custom_id:
        return Fault(FaultCode.MISSING_CUSTOM_ID, "custom_id must be a string that is not empty")
    if len(custom_id.encode("utf-8", "replace")) > MAX_CUSTOM_ID_BYTES:
        return Fault(FaultCode.MISSING_CUSTOM_ID, f"custom_id is longer than {MAX_CUSTOM_ID_BYTES} bytes")
    return None


def _fault_of_head(line: dict[str, Any]) -> tuple[FaultCode, str] | None:
    method, url = line.get("method"), line.get("url")
    if method is not None and method != "POST":
        return FaultCode.INVALID_METHOD, "method must be POST, or absent"
    if url is not None and url != URL:
        return FaultCode.INVALID_URL, f"url must be {URL}, or absent; other endpoints are not supported"
    if "body" not in line and "params" in line:
        message = "this is a line of Anthropic's Message Batches; rewrite it as custom_id and an OpenAI body"
        return FaultCode.INVALID_BODY, message
    return None


def _fault_of_body(line: dict[str, Any]) -> tuple[FaultCode, str] | None:
    body = line.get("body")
    if type(body) is not dict:
        return FaultCode.INVALID_BODY, "body must be a JSON object"
    model, messages = body.get("model"), body.get("messages")
    if type(model) is not str or not model:
        return FaultCode.INVALID_BODY, "body.model must be a string that is not empty"
    if type(messages) is not list or not messages:
        return FaultCode.INVALID_BODY, "body.messages must be an array that is not empty"
    if body.get("stream"):
        return (
            FaultCode.STREAM_NOT_SUPPORTED,
            "body.stream must be absent or false: a line has one whole answer",
        )
    return None
