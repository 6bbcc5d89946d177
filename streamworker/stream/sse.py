"""Parser of event streams: WHATWG HTML §9.2.6 over bytes, without I/O.

Feed it the bytes of the socket in any pieces; it returns the events that are complete. Time is linear in the
number of bytes, and memory is bounded by `max_event_bytes`, whatever the pieces are.

Two extensions of the standard are needed for real upstreams:

* **Events without blank lines between them.** A `data` line that arrives while the pending data is a complete JSON
  object ends that event first. An object followed by another line can never be valid JSON, so multi-line payloads are
  safe. Once a stream has done this, every object and `[DONE]` is dispatched with its line. In a stream that has not,
  `[DONE]` followed by another line is text and does not end the stream.
* **`[DONE]` at the end of input** is dispatched without its blank line, and even without its line end.
"""

from __future__ import annotations

import re

import msgspec

from streamworker.wire.json import InvalidJSON, decode_lenient

__all__ = ["BARE_JSON", "EventStreamParser", "ServerSentEvent"]

BARE_JSON = ""
"""Type of an event that consists of JSON without a field name. No other event has an empty type."""

_BOM = b"\xef\xbb\xbf"
_BLANKS = b" \t\r\n\x0c"
_DONE = b"[DONE]"
# The tokens that decide where a JSON object ends: quotes, escapes and brackets.
_STRUCTURE = re.compile(rb'\\.|["{}\[\]]', re.DOTALL)


class ServerSentEvent(msgspec.Struct, frozen=True, gc=False):
    """One dispatched event. `data` is bytes, as JSON decoders need them; `text` is the decoded data."""

    type: str
    data: bytes
    last_event_id: str = ""
    retry: int | None = None

    @property
    def text(self) -> str:
        """The data decoded as UTF-8, with U+FFFD for invalid bytes."""
        return self.data.decode("utf-8", "replace")


class EventStreamParser:
    """Turns bytes into events.

    When an event or a line exceeds `max_event_bytes`, `overflowed` becomes and stays true, and no more events are
    returned. `extra_fields` names fields outside of the standard (`error:` of older llama.cpp) that are returned as
    events of that type. With `bare_json`, JSON objects and arrays on lines of their own, without `data:`, are returned
    as events of type `BARE_JSON`: the standard ignores such lines, but some upstreams send their errors that way.
    """

    def __init__(
        self,
        *,
        max_event_bytes: int = 1 << 20,
        extra_fields: frozenset[bytes] = frozenset(),
        bare_json: bool = False,
    ) -> None:
        self.overflowed = False
        self.last_event_id = ""
        self.reconnection_time: int | None = None
        self._max = max_event_bytes
        self._extra_fields = extra_fields
        self._events: list[ServerSentEvent] = []
        # The pieces of the unfinished line. They are joined once, when the line ends; joining per piece would
        # be O(n²).
        self._tail: list[bytes] = []
        self._tail_size = 0
        self._first_line = True
        self._swallow_lf = False
        self.is_between_events = False
        """Whether the last event was dispatched, and nothing has followed it so far."""
        self._unblanked = False
        self._id = ""
        self._pending = _Pending()
        self._bare = _Pending((b"{", b"[")) if bare_json else None

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """Parse bytes; return the events that they complete, oldest first."""
        if self.overflowed or not data:
            return []
        end = len(data) - 2
        if (  # one `data` line and its blank line, as in nearly every read
            self.is_between_events
            and data.startswith(b"data: ")
            and data.find(b"\n") == end <= self._max
            and data.endswith(b"\n")
            and b"\r" not in data
        ):
            self._swallow_lf = False
            return [ServerSentEvent("message", data[6:end], self._id)]
        if self._swallow_lf:  # CR ended its line at once; this LF is the second half of a CRLF
            data = data.removeprefix(b"\n")
        self._swallow_lf = data.endswith(b"\r")
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        lines = data.split(b"\n")
        tail = lines.pop()
        if lines:
            lines[0] = self._finish_tail(lines[0])
            for line in lines:
                self._line(line)
                if self.overflowed:
                    return self._pop_events()
        self._keep_tail(tail)
        self.is_between_events = bool(lines) and not lines[-1] and not tail and not self._is_in_bare_json
        return self._pop_events()

    def close(self) -> list[ServerSentEvent]:
        """End the input. An unfinished event is discarded, as the standard requires, unless it is `[DONE]`."""
        if self.overflowed:
            return []
        rest = self._finish_tail(b"")
        if rest.startswith(b"data:") and rest.removeprefix(b"data:").strip(_BLANKS) == _DONE:
            self._line(rest)
        elif rest and not rest.startswith(b":"):
            # The input ends inside another line, so a `[DONE]` before it was text. Bare JSON needs no line end.
            if not rest.startswith(b"data:"):
                self._bare_line(rest)
            return self._pop_events()
        if self._pending.is_done_sentinel:
            self._dispatch()
        return self._pop_events()

    def _pop_events(self) -> list[ServerSentEvent]:
        events, self._events = self._events, []
        return events

    def _finish_tail(self, end: bytes) -> bytes:
        if self._tail:
            self._tail.append(end)
            end = b"".join(self._tail)
            self._tail.clear()
            self._tail_size = 0
        if self._first_line:
            self._first_line = False
            return end.removeprefix(_BOM)
        return end

    def _keep_tail(self, tail: bytes) -> None:
        if tail:
            self._tail.append(tail)
            self._tail_size += len(tail)
            # A byte order mark is not part of its line. It may be split itself, so a line that may begin with
            # one gets extra room.
            may_be_marked = self._first_line and self._tail[0].startswith(_BOM[:1])
            self._check_size(self._tail_size - (len(_BOM) if may_be_marked else 0))

    def _check_size(self, line: int) -> None:
        if self._pending.size + line > self._max:
            self.overflowed = True
            self._tail.clear()
            self._pending.reset()

    def _line(self, line: bytes) -> None:
        if not line:
            self._blank_line()
            return
        self._check_size(len(line))
        if self.overflowed:
            return
        if line.startswith(b"data: "):  # as nearly every line does
            self._data(line[6:])
            return
        name, _, value = line.partition(b":")
        self._field(name, value.removeprefix(b" "), line)

    def _field(self, name: bytes, value: bytes, line: bytes) -> None:
        match name:
            case b"data":
                self._data(value)
            case b"event":
                self._pending.set_type(value.decode("utf-8", "replace"))
            case b"id" if b"\0" not in value:
                self._id = value.decode("utf-8", "replace")
            case b"retry" if (
                value.isdigit() and len(value) < 20
            ):  # int() alone accepts "+5", "1_0" and Thai digits
                self._pending.retry = self.reconnection_time = int(value)
            case _ if name in self._extra_fields:
                self._events.append(ServerSentEvent(name.decode(), value, self.last_event_id))
            case _ if name:  # not a comment
                self._bare_line(line)

    @property
    def _is_in_bare_json(self) -> bool:
        return self._bare is not None and bool(self._bare.lines)

    def _bare_line(self, line: bytes) -> None:
        """Read a line without a known field name as JSON, or as part of JSON that spans several lines."""
        bare, pending = self._bare, self._pending
        if bare is None:
            return
        if not bare.lines and (
            line.lstrip(_BLANKS)[:1] not in {b"{", b"["} or (pending.lines and not pending.is_object())
        ):
            return
        bare.add(line)
        if bare.is_object():
            if pending.lines:
                self._dispatch()
            self._events.append(ServerSentEvent(BARE_JSON, bare.data, self.last_event_id))
            bare.reset()
        elif bare.is_hopeless or bare.size > self._max:
            bare.reset()

    def _data(self, value: bytes) -> None:
        pending = self._pending
        if self._is_in_bare_json and self._bare is not None:
            self._bare.reset()
        if pending.lines and pending.is_object():
            self._unblanked = True
            self._dispatch(pending.take_late_type())
        pending.add(value)
        if self._unblanked and (pending.is_done_sentinel or pending.is_comment or pending.is_object()):
            self._dispatch()

    def _blank_line(self) -> None:
        self.last_event_id = self._id
        if self._pending.lines:
            self._dispatch()
        self._pending.reset()

    def _dispatch(self, next_type: str | None = None) -> None:
        pending = self._pending
        self.last_event_id = self._id
        event_type = pending.type if pending.late_type is None else pending.late_type
        self._events.append(ServerSentEvent(event_type or "message", pending.data, self._id, pending.retry))
        pending.reset()
        pending.type = next_type or ""


class _Pending:
    """The event that is being read. It knows, in linear time, whether its data is one whole JSON object."""

    __slots__ = (
        "_depth",
        "_in_string",
        "_is_parsed",
        "_openers",
        "_scanned",
        "is_hopeless",
        "late_type",
        "lines",
        "retry",
        "size",
        "type",
    )

    def __init__(self, openers: tuple[bytes, ...] = (b"{",)) -> None:
        """`openers` are the brackets with which the JSON may begin."""
        self.lines: list[bytes] = []
        self._openers = openers
        self.reset()

    def reset(self) -> None:
        self.type = ""
        self.late_type: str | None = None  # from an `event` line after the data
        self.retry: int | None = None
        self.lines.clear()
        self.size = 0
        self._scanned = 0
        self._depth = 0
        self._in_string = False
        self._is_parsed = False
        self.is_hopeless = False
        """Whether the data cannot become a whole object with more lines."""

    def add(self, value: bytes) -> None:
        self.lines.append(value)
        self.size += len(value) + 1

    def set_type(self, value: str) -> None:
        if self.lines:
            self.late_type = value
        else:
            self.type = value

    def take_late_type(self) -> str | None:
        """Remove and return the type that followed the data. Without blank lines it belongs to the next event."""
        late, self.late_type = self.late_type, None
        return late

    @property
    def data(self) -> bytes:
        return self.lines[0] if len(self.lines) == 1 else b"\n".join(self.lines)

    @property
    def is_done_sentinel(self) -> bool:
        return len(self.lines) == 1 and self.lines[0].strip(_BLANKS) == _DONE

    @property
    def is_comment(self) -> bool:
        """Whether the data is a comment inside of `data`, which some upstreams send as a keep-alive."""
        return len(self.lines) == 1 and self.lines[0].startswith(b":")

    def is_object(self) -> bool:
        """Whether the data so far is one whole JSON object."""
        return self._is_balanced() and self._parses()

    def _is_balanced(self) -> bool:
        """Count brackets in the lines that are not scanned yet; each line is scanned once."""
        if (
            not self._scanned and not self.is_hopeless
        ):  # checked once, because lstrip() may copy: O(n²) if done per line
            self.is_hopeless = not self.lines[0].lstrip(_BLANKS).startswith(self._openers)
        if self.is_hopeless:
            return False
        for line in self.lines[self._scanned :]:
            self._scan(line)
        self._scanned = len(self.lines)
        return self._depth == 0

    def _scan(self, line: bytes) -> None:
        for token in _STRUCTURE.finditer(line):
            match token.group():
                case b'"':
                    self._in_string = not self._in_string
                case b"{" | b"[" if not self._in_string:
                    self._depth += 1
                case b"}" | b"]" if not self._in_string:
                    self._depth -= 1

    def _parses(self) -> bool:
        """Parse once. Balanced data that is not JSON does not become JSON with more lines."""
        if not self._is_parsed:
            self._is_parsed = True
            try:
                decode_lenient(self.data)
            except InvalidJSON:
                self.is_hopeless = True
        return not self.is_hopeless
