"""Decides by a body's first bytes what it is: an event stream, or a JSON document that came instead.

The content type does not decide, because upstreams send streams under any content type, and errors under that of a
stream.
"""

from __future__ import annotations

import re

from streamworker.wire.json import InvalidJSON, decode_lenient

__all__ = ["BodyForm", "is_json", "looks_like_event_stream"]

_SKIPPED = b"\xef\xbb\xbf \t\r\n"
_FIELD = re.compile(rb"[\r\n](?:data|event|id|retry)?:")
_FIRST_FIELD = re.compile(rb"(?:\xef\xbb\xbf)?(?:data|event|id|retry)?:")
_LONGEST_FIELD = len(b"\nevent:")


class BodyForm:
    """Splits off a JSON document from the bytes of a body."""

    def __init__(self, max_bytes: int) -> None:
        self.is_stream = False
        """Whether the body is known to be an event stream: the bytes are for the parser from now on."""
        self.overflowed = False
        self._max = max_bytes
        self._document: bytearray | None = None

    @property
    def document(self) -> bytes | None:
        """The JSON document so far; None if the body is not one."""
        return None if self._document is None else bytes(self._document)

    def feed(self, data: bytes) -> bytes:
        """Take bytes of the body; return those that are for the event-stream parser.

        A document is held back. If a field of an event stream follows it, on a line of its own, the body is a stream
        that begins with bare JSON, and all of it is returned.
        """
        if self.is_stream or self.overflowed:
            return data if self.is_stream else b""
        if self._document is None:
            text = data.lstrip(_SKIPPED)
            if text[:1] not in {b"{", b"["}:
                self.is_stream = bool(text)
                return data
            skipped = data[: len(data) - len(text)]
            self._document = bytearray(text)
            self._look(0)
        else:
            skipped = b""
            start = max(0, len(self._document) - _LONGEST_FIELD)
            self._document += data
            self._look(start)
        if not self.is_stream:
            return skipped
        document, self._document = bytes(self._document), None
        return skipped + document

    def _look(self, start: int) -> None:
        """Decide whether the document is followed by events or is too long, alike for every chunking."""
        assert self._document is not None
        field = _FIELD.search(self._document, start, self._max)
        self.is_stream = field is not None
        if not self.is_stream and len(self._document) > self._max:
            self.overflowed = True
            self._document.clear()


def is_json(document: bytes) -> bool:
    """Whether a document is whole."""
    try:
        decode_lenient(document)
    except InvalidJSON:
        return False
    return True


def looks_like_event_stream(opening: bytes) -> bool:
    """Whether the first bytes of a body have a field or a comment of an event stream."""
    return _FIRST_FIELD.match(opening) is not None or _FIELD.search(opening) is not None
