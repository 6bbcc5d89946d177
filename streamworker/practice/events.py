"""Lines of an event stream: payloads, keep-alives and the `[DONE]` sentinel."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING, Any, Final

import orjson

if TYPE_CHECKING:
    from collections.abc import Iterator

FORMATS: Final = {
    "seed": b"\n\n",
    "unblanked": b"\n",
    "crlf": b"\r\n\r\n",
    "cr": b"\r\r",
    "no_space": b"\n\n",
    "multiline": b"\n\n",
    "bom": b"\n\n",
}
"""The bytes after a data line, by `format`: the line end, and the blank line if the format has one."""

KEEPALIVES: Final = {
    "comment": b": keep-alive",
    "openrouter": b": OPENROUTER PROCESSING",
    "bare": b":",
    "event": b"event: ping",
    "data": b"data:",
    "retry": b"retry: 3000",
    "id": b"id: 7",
    "json": b'data: {"type":"ping"}',
    "null": b"data: null",
    "object": b"data: {}",
    "no_error": b'data: {"error":null}',
    "blank": b"",
}
DONES: Final = {
    "plain": b"data: [DONE]",
    "blanks": b"data:  [DONE] ",
    "no_space": b"data:[DONE]",
    "no_newline": b"data: [DONE]",
    "named": b"event: done\ndata: [DONE]",
    "junk": b"data: [DONE]",
}
BOM: Final = b"\xef\xbb\xbf"
JUNK: Final = b'data: {"this is": "for no reader"}\n\ndata: nor is this\n\n'


class Events:
    """Encode the lines of one stream."""

    def __init__(self, line_format: str, keepalive: str | None) -> None:
        self._format = line_format
        self._ending = FORMATS[line_format]
        self._field = b"data:" if line_format == "no_space" else b"data: "
        kinds = list(KEEPALIVES) if keepalive == "all" else [keepalive or "comment"]
        self._keepalives: Iterator[bytes] = cycle(KEEPALIVES[kind] for kind in kinds)
        self.start = BOM if line_format == "bom" else b""

    def json(self, payload: Any) -> bytes:
        """Return an event with a JSON payload."""
        if self._format != "multiline":
            return self.data(orjson.dumps(payload))
        lines = orjson.dumps(payload, option=orjson.OPT_INDENT_2).split(b"\n")
        return b"\n".join(self._field + line for line in lines) + self._ending

    def data(self, payload: bytes) -> bytes:
        """Return an event with this payload."""
        return self._field + payload + self._ending

    def line(self, line: bytes) -> bytes:
        """Return a line with the line end of the format."""
        return line + self._ending

    def keepalive(self) -> bytes:
        """Return the next keep-alive."""
        return self.line(next(self._keepalives))

    def done(self, how: str) -> bytes:
        """Return the `[DONE]` sentinel."""
        if how == "no_newline":
            return DONES[how]
        return self.line(DONES[how]) + (JUNK if how == "junk" else b"")

    def unfinished(self, payload: Any, upto: bytes) -> bytes:
        """Return the beginning of an event, up to and including `upto`."""
        text = self.data(orjson.dumps(payload))
        return text[: text.rindex(upto) + len(upto)]
