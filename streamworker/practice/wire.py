"""Bytes of the answers: chunks in the seed's shape, event-stream lines, JSON bodies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Sequence

ENDINGS: Final = {"seed": b"\n\n", "unblanked": b"\n", "crlf": b"\r\n\r\n", "cr": b"\r\r"}
"""What stands after a line's last byte, by `format`: the line end, and the blank line where there is one."""

ROLE: Final = b'{"role":"assistant"}'
EVENT_STREAM: Final = (("content-type", "text/event-stream"), ("cache-control", "no-cache"))
CLOSE_HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\nconnection: close\r\n\r\n"
HTML: Final = (
    b"<!DOCTYPE html>\n<html><head><title>Practice</title></head><body>Not an event stream.</body></html>\n"
)
MULTI_BYTE: Final = "🐟".encode()


class Chunks:
    """The chunks of one answer as event-stream bytes; all that does not change is put together once."""

    def __init__(self, answer_id: str, name: str, choices: int, line_format: str) -> None:
        self._ending = ENDINGS[line_format]
        head = orjson.dumps({"id": answer_id, "object": "chat.completion.chunk", "model": name})
        self._start = b"data: " + head[:-1] + b',"choices":['
        self._choices = [self._start + b'{"index":%d,"delta":' % index for index in range(choices)]
        self._plain_end = b"}]}" + self._ending
        self.done = b"data: [DONE]" + self._ending
        self.ping = b": ping" + self._ending
        self.endless = self._choices[0] + b'{"content":"'

    def delta(
        self, choice: int, delta: bytes, finish_reason: str | None, usage: dict[str, int] | None
    ) -> bytes:
        """A chunk with one delta; `delta` is the object's JSON."""
        if finish_reason is None and usage is None:
            return self._choices[choice] + delta + self._plain_end
        finish = b',"finish_reason":"%b"' % finish_reason.encode() if finish_reason else b""
        return self._choices[choice] + delta + finish + b"}]" + _usage_member(usage) + b"}" + self._ending

    def usage(self, usage: dict[str, int]) -> bytes:
        """The own last chunk: no choices."""
        return self._start + b"]" + _usage_member(usage) + b"}" + self._ending

    def error(self, body: dict[str, Any]) -> bytes:
        """An error inside the stream: no chunk at all, only `error`."""
        return b"data: " + orjson.dumps(body) + self._ending

    def cut(self, choice: int) -> bytes:
        """The start of a content delta, up to the middle of a four-byte character."""
        return self._choices[choice] + b'{"content":"' + MULTI_BYTE[:2]


def _usage_member(usage: dict[str, int] | None) -> bytes:
    return b',"usage":' + orjson.dumps(usage) if usage else b""


def error_body(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """`{"error": {message, type, param, code}}`, the shape OpenAI's clients read."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def completion(
    answer_id: str,
    name: str,
    said: Sequence[dict[str, Any]],
    finish_reason: str,
    usage: dict[str, int] | None,
) -> dict[str, Any]:
    """A whole chat.completion; `said` is one message per choice."""
    listed = [
        {"index": index, "message": message, "finish_reason": finish_reason}
        for index, message in enumerate(said)
    ]
    whole = {"id": answer_id, "object": "chat.completion", "model": name, "choices": listed}
    return whole if usage is None else whole | {"usage": usage}
