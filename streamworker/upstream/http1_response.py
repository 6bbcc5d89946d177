"""A parser for one HTTP/1.1 response, without I/O.

The grammar is llhttp's (through httptools), in its strict mode but for what RFC 9112 asks a recipient to accept in a
response: bare LF as a line end *of the head*, folded header lines, spaces after a chunk size, a Content-Length that
Transfer-Encoding overrides, and interim responses that announce a close. White space around the `;` and `=` of a chunk
extension is refused, because llhttp has no switch for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NoReturn

import httpx
from httptools import HttpParserError, HttpResponseParser

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "MAX_FRAMING_BYTES",
    "MAX_HEADERS",
    "MAX_HEAD_BYTES",
    "HeadCut",
    "ResponseHead",
    "ResponseParser",
    "ServerDisconnected",
]

MAX_HEAD_BYTES = 72 << 10
"""Limit of a response's head, interim responses included: 64 KiB of a server's own fields, and the usual ones."""

MAX_HEADERS = 220
"""Limit of the header fields of a response, 200 of a server's own and the usual ones. Trailer fields have the same limit
of their own."""

MAX_FRAMING_BYTES = 72 << 10
"""Limit of chunk sizes, chunk extensions and trailers between two reads that contain a byte of the body."""

_CHUNKED = b"chunked"
_IDENTITY = b"identity"


class HeadCut(httpx.RemoteProtocolError):
    """The server closed the connection inside the response's head."""


class ServerDisconnected(HeadCut):
    """The server closed or reset the connection before it sent a byte of the response."""

    def __init__(self) -> None:
        super().__init__("Server disconnected without sending a response.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """The status line and the header fields of a final response, as they were sent."""

    status: int
    reason: bytes
    http_version: bytes
    headers: list[tuple[bytes, bytes]]


class ResponseParser:
    """Parse one response from the reads of a connection.

    `feed()` takes what was read and returns the body bytes in it. Whenever `changed` is true afterwards, `head` has
    become known, or the response has ended: `is_complete`, or `error` is set. What precedes a fault is always
    returned: the fault ends the response, and does not raise.
    """

    __slots__ = (
        "_feed",
        "_framing_bytes",
        "_head_bytes",
        "_headers",
        "_is_closed_by_eof",
        "_method",
        "_parser",
        "_pieces",
        "_reason",
        "_trailers",
        "changed",
        "error",
        "head",
        "is_complete",
        "is_reusable",
        "on_body",
    )

    def __init__(self, method: str) -> None:
        self.head: ResponseHead | None = None
        self.error: httpx.TransportError | None = None
        self.is_complete = False
        """The body has ended as its framing says."""
        self.is_reusable = False
        """Both sides keep the connection open after this response. Meaningful once `is_complete`."""
        self.changed = False
        """`head`, `is_complete` or `error` was set. The caller resets it."""
        self._method = method
        self._head_bytes = 0
        self._framing_bytes = 0
        self._headers: list[tuple[bytes, bytes]] = []
        self._trailers = 0
        self._reason = b""
        self._is_closed_by_eof = False
        self._pieces: list[bytes] = []
        self.on_body: Callable[[bytes], None] = self._pieces.append  # llhttp's callback runs no Python
        parser = HttpResponseParser(self)
        self._parser: HttpResponseParser | None = parser
        parser.set_dangerous_leniencies(
            lenient_headers=True,
            lenient_chunked_length=True,
            lenient_keep_alive=True,
            lenient_optional_cr_before_lf=True,
            lenient_spaces_after_chunk_size=True,
        )
        self._feed: Callable[[bytes], None] = parser.feed_data

    @property
    def is_untouched(self) -> bool:
        """Whether not a byte of the response has been read."""
        return self._head_bytes == 0

    def feed(self, data: bytes) -> bytes:
        """Parse what was read; return the body bytes in it."""
        if self.head is None:
            return self._feed_head(data)
        try:
            self._feed(data)
        except HttpParserError as error:
            self._stop(error)
        pieces = self._pieces
        if len(pieces) == 1 and not self.changed:
            self._framing_bytes = 0
            return pieces.pop()
        return self._joined(len(data))

    def release_headers(self) -> None:
        """Release the header fields, which the caller has taken; `head` stays known."""
        if self.head is not None:
            self.head = replace(self.head, headers=[])

    def feed_eof(self) -> None:
        """End the response: the server closed its side of the connection."""
        if self.is_complete or self.error is not None:
            return
        if self.is_untouched:
            self.fail(ServerDisconnected())
        elif self.head is None:
            self.fail(HeadCut("peer closed connection inside the response's head"))
        elif self._is_closed_by_eof:
            self._complete()
            self._release()
        else:
            # The words of httpx's own transport, which people search for.
            text = "peer closed connection without sending complete message body"
            self.fail(httpx.RemoteProtocolError(text))

    def fail(self, error: httpx.TransportError) -> None:
        """End the response with an error, unless it has ended."""
        if not self.is_complete and self.error is None:
            self.error = error
            self.changed = True
            self._release()

    # What llhttp calls. It swallows what these raise, and stops parsing.

    def on_message_begin(self) -> None:
        """Stop where a second response begins: nothing was asked that it could answer."""
        if self.is_complete:
            raise _Stop

    def on_status(self, reason: bytes) -> None:
        """Collect the reason phrase, which may arrive in parts."""
        self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header field; count a trailer field."""
        if self.head is not None:
            self._trailers += 1
            if self._trailers > MAX_HEADERS:
                self._refuse(f"the response has more than {MAX_HEADERS} trailer fields")
            return
        if len(self._headers) == MAX_HEADERS:
            self._refuse(f"the response has more than {MAX_HEADERS} headers")
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Skip an interim response; make the head of a final one."""
        parser = self._parser
        assert parser is not None
        status = parser.get_status_code()
        version = parser.get_http_version()
        if version not in {"1.0", "1.1"}:
            self._refuse(f"HTTP version {version} is not supported")
        if status == 101:
            self._refuse("the server switched protocols (101), which was not asked for")
        if status < 100:
            self._refuse(f"status code {status} is not valid")
        if status < 200:
            self._skip_interim(keep_alive=parser.should_keep_alive())
            return
        parser.set_dangerous_leniencies(lenient_optional_cr_before_lf=False)  # chunks have to be exact
        keep_alive = parser.should_keep_alive()
        headers = self._checked_headers(keep_alive=keep_alive)
        self.head = ResponseHead(
            status=status, reason=self._reason, http_version=f"HTTP/{version}".encode(), headers=headers
        )
        self.changed = True
        if self._method == "HEAD" or (self._method == "CONNECT" and status < 300):
            self._complete()
            raise _Stop  # llhttp has no way to skip a body that the head announced

    def on_message_complete(self) -> None:
        """Note the end of the body."""
        if self.head is not None:
            self._complete()

    # Inside.

    def _feed_head(self, data: bytes) -> bytes:
        room = MAX_HEAD_BYTES - self._head_bytes
        self._head_bytes += len(data)
        body = self._parsed(data[:room])
        if len(data) > room and not (self.is_complete or self.error):
            if self.head is None:
                self.fail(
                    httpx.RemoteProtocolError(f"the response's head is larger than {MAX_HEAD_BYTES} bytes")
                )
            else:
                body += self._parsed(data[room:])
        self._framing_bytes = 0
        return body

    def _parsed(self, data: bytes) -> bytes:
        try:
            self._feed(data)
        except HttpParserError as error:
            self._stop(error)
        return self._joined(len(data))

    def _joined(self, size: int) -> bytes:
        """Return the body bytes of a read of `size` bytes that has none or several pieces of the body."""
        if self.is_complete or self.error is not None:
            self._release()
        pieces = self._pieces
        if pieces:
            self._framing_bytes = 0
            body = b"".join(pieces)
            pieces.clear()
            return body
        self._framing_bytes += size
        if self._framing_bytes > MAX_FRAMING_BYTES and self.head is not None:
            text = f"more than {MAX_FRAMING_BYTES} bytes of chunk framing without a byte of the body"
            self.fail(httpx.RemoteProtocolError(text))
        return b""

    def _skip_interim(self, *, keep_alive: bool) -> None:
        """Forget an interim response. llhttp would add the length that it announces to that of the next one."""
        if not keep_alive and any(name.lower() == b"content-length" for name, _ in self._headers):
            self._refuse("an interim response announces a body and a close")
        self._headers.clear()
        self._reason = b""

    def _checked_headers(self, *, keep_alive: bool) -> list[tuple[bytes, bytes]]:
        """Return the header fields; find out how the body is delimited, and whether the connection stays open."""
        headers: list[tuple[bytes, bytes]] = []
        codings: list[bytes] = []
        has_length = False
        if b"\0" in self._reason:
            self._refuse("the reason phrase contains a NUL character")
        for name, value in self._headers:
            if b" " in name or b"\t" in name:  # llhttp accepts "Content-Length : 5", and believes it
                self._refuse("the name of a header contains white space")
            if b"\0" in value:
                self._refuse(f"the value of the header {name.decode('latin-1')!r} contains a NUL character")
            lowered = name.lower()
            if lowered == b"transfer-encoding":
                codings.append(value.lower())
            elif lowered == b"content-length":
                has_length = True
            headers.append((name, value.rstrip(b" \t")))
        is_chunked = bool(codings) and self._is_chunked(codings, keep_alive=keep_alive)
        self._is_closed_by_eof = not is_chunked and (bool(codings) or not has_length)
        # Two codings, or a length beside a coding, are suspicious: the connection is not used again.
        self.is_reusable = keep_alive and len(codings) <= 1 and not (codings and has_length)
        self._headers = []
        return headers

    def _is_chunked(self, codings: list[bytes], *, keep_alive: bool) -> bool:
        """Tell chunked bodies from those that the end of the connection ends; refuse every other coding."""
        if all(coding == _CHUNKED for coding in codings):
            return True
        if all(coding == _IDENTITY for coding in codings):
            return False
        # llhttp does not see every white space after the coding. It has seen this one if it knows where the body ends.
        if len(codings) == 1 and codings[0].rstrip(b" \t") == _CHUNKED and keep_alive:
            return True
        shown = b", ".join(codings)[:40].decode("latin-1")
        return self._refuse(f"transfer-encoding {shown!r} is not supported")

    def _complete(self) -> None:
        self.is_complete = True
        self.changed = True

    def _refuse(self, text: str) -> NoReturn:
        """End the response with an error from inside of a callback."""
        self.error = httpx.RemoteProtocolError(text)
        self.changed = True
        raise _Stop

    def _stop(self, error: Exception) -> None:
        """Take what llhttp raised: a fault of the response, or of what follows a complete one."""
        if self.is_complete:
            self.is_reusable = False
        elif self.error is None:
            text = "it does not begin with HTTP/" if str(error).startswith("Expected HTTP/") else str(error)
            self.fail(httpx.RemoteProtocolError(f"invalid HTTP response: {text}"))

    def _release(self) -> None:
        """Release llhttp, whose callbacks refer to this object."""
        self._feed = _ignore
        self._parser = None


class _Stop(Exception):
    """Stop llhttp."""


def _ignore(_data: bytes) -> None:
    """Drop what follows the end of the response."""
