"""Event streams: the parser of WHATWG HTML §9.2.6, over bytes, without I/O.

Feed it what the socket gave, in any pieces; it returns the events that are complete. Time is linear in the bytes fed
and memory is bounded by `max_event_bytes`, whatever the pieces are.

Two things go beyond the standard, because upstreams do:

* **Events without blank lines between them.** A `data` line that arrives while the pending data already is a complete
  JSON object ends that event first: an object followed by another line could never be valid JSON, so multi-line
  payloads are safe. Once a stream has shown that it does this, an object or `[DONE]` is handed out with its line. In
  a stream that has not, `[DONE]` followed by another line is text: it may not pose as the end.
* **`[DONE]` at the end of input** counts without its blank line, or even its line end.
"""

from __future__ import annotations

import re

import msgspec

from streamworker.wire.json import InvalidJSON, decode

__all__ = ["EventStreamParser", "ServerSentEvent"]

_BOM = b"\xef\xbb\xbf"
_BLANKS = b" \t\r\n\x0c"
_DONE = b"[DONE]"
# What decides where a JSON object ends: quotes, what follows a backslash, and brackets.
_STRUCTURE = re.compile(rb'\\.|["{}\[\]]', re.DOTALL)


class ServerSentEvent(msgspec.Struct, frozen=True, gc=False):
    """One dispatched event. `data` is bytes: JSON readers want those, and `text` is there for the rest."""

    type: str
    data: bytes
    last_event_id: str = ""
    retry: int | None = None

    @property
    def text(self) -> str:
        """The data decoded as the standard says: UTF-8 always, U+FFFD for what is not."""
        return self.data.decode("utf-8", "replace")


class EventStreamParser:
    """Bytes in, events out.

    Once an event (or a single line) grows beyond `max_event_bytes`, `overflowed` is true and stays so; nothing more is
    handed out. `extra_fields` names fields outside the standard (`error:` of older llama.cpp) which are then handed
    out as events of that type.
    """

    def __init__(
        self, *, max_event_bytes: int = 1 << 20, extra_fields: frozenset[bytes] = frozenset()
    ) -> None:
        self.overflowed = False
        self.last_event_id = ""
        self.reconnection_time: int | None = None
        self._max = max_event_bytes
        self._extra_fields = extra_fields
        self._events: list[ServerSentEvent] = []
        # The unfinished line, in pieces: joined once when it ends, or a long line would cost O(n²).
        self._tail: list[bytes] = []
        self._tail_size = 0
        self._first_line = True
        self._swallow_lf = False
        self._is_between_events = False
        self._unblanked = False
        self._id = ""
        self._pending = _Pending()

    def feed(self, data: bytes) -> list[ServerSentEvent]:
        """Take bytes as they came; return the events that they complete, oldest first."""
        if self.overflowed or not data:
            return []
        end = len(data) - 2
        if (  # one `data` line and the blank line after it: what nearly every read is
            self._is_between_events
            and data.startswith(b"data: ")
            and data.find(b"\n") == end <= self._max
            and data.endswith(b"\n")
            and b"\r" not in data
        ):
            self._swallow_lf = False
            return [ServerSentEvent("message", data[6:end], self._id)]
        if self._swallow_lf:  # CR ended its line at once; this LF is the other half of a CRLF cut in two
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
                    return self._hand_out()
        self._keep_tail(tail)
        self._is_between_events = bool(lines) and not lines[-1] and not tail
        return self._hand_out()

    def close(self) -> list[ServerSentEvent]:
        """Take the end of input. An unfinished event is discarded, as the standard says, unless it is `[DONE]`."""
        if self.overflowed:
            return []
        rest = self._finish_tail(b"")
        if rest.startswith(b"data:") and rest.removeprefix(b"data:").strip(_BLANKS) == _DONE:
            self._line(rest)
        elif rest and not rest.startswith(b":"):  # cut off in a further line: a `[DONE]` before it was text
            return []
        if self._pending.is_done_sentinel:
            self._dispatch()
        return self._hand_out()

    def _hand_out(self) -> list[ServerSentEvent]:
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
            # A byte order mark is no part of its line, and may be cut in two itself: what may be one gets its room.
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
        if line.startswith(b"data: "):  # what nearly every line is
            self._data(line[6:])
            return
        name, _, value = line.partition(b":")
        self._field(name, value.removeprefix(b" "))

    def _field(self, name: bytes, value: bytes) -> None:
        match name:
            case b"data":
                self._data(value)
            case b"event":
                self._pending.set_type(value.decode("utf-8", "replace"))
            case b"id" if b"\0" not in value:
                self._id = value.decode("utf-8", "replace")
            case b"retry" if (
                value.isdigit() and len(value) < 20
            ):  # int() alone takes "+5", "1_0" and Thai digits
                self._pending.retry = self.reconnection_time = int(value)
            case _ if name in self._extra_fields:
                self._events.append(ServerSentEvent(name.decode(), value, self.last_event_id))

    def _data(self, value: bytes) -> None:
        pending = self._pending
        if pending.lines and pending.is_object():
            self._unblanked = True
            self._dispatch(pending.take_late_type())
        pending.add(value)
        if self._unblanked and (pending.is_done_sentinel or pending.is_object()):
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
    """The event that is being read. Knows, in linear time, whether its data already is one whole JSON object."""

    __slots__ = (
        "_depth",
        "_hopeless",
        "_in_string",
        "_scanned",
        "late_type",
        "lines",
        "retry",
        "size",
        "type",
    )

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.reset()

    def reset(self) -> None:
        self.type = ""
        self.late_type: str | None = None  # given by an `event` line after the data
        self.retry: int | None = None
        self.lines.clear()
        self.size = 0
        self._scanned = 0
        self._depth = 0
        self._in_string = False
        self._hopeless = False

    def add(self, value: bytes) -> None:
        self.lines.append(value)
        self.size += len(value) + 1

    def set_type(self, value: str) -> None:
        if self.lines:
            self.late_type = value
        else:
            self.type = value

    def take_late_type(self) -> str | None:
        """Give up the type that came after the data: where events have no blank lines it is the next one's."""
        late, self.late_type = self.late_type, None
        return late

    @property
    def data(self) -> bytes:
        return self.lines[0] if len(self.lines) == 1 else b"\n".join(self.lines)

    @property
    def is_done_sentinel(self) -> bool:
        return len(self.lines) == 1 and self.lines[0].strip(_BLANKS) == _DONE

    def is_object(self) -> bool:
        """Whether the data so far is one whole JSON object."""
        return self._is_balanced() and self._parses()

    def _is_balanced(self) -> bool:
        """Count brackets over the lines not seen yet; each line is scanned once."""
        if (
            not self._scanned and not self._hopeless
        ):  # asked once: stripping may copy, at every line that is O(n²)
            self._hopeless = not self.lines[0].lstrip(_BLANKS).startswith(b"{")
        if self._hopeless:
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
        """Parse once; what is balanced and yet no JSON never becomes JSON by more lines."""
        try:
            decode(self.data)
        except InvalidJSON:
            self._hopeless = True
        return not self._hopeless
