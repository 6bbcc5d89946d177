"""The rules of RFC 6455 for the heads of a client's frames that aiohttp's reader leaves out. No I/O.

That reader serves clients as well as servers. So it also accepts frames without a mask, lengths in more bytes than they
need, and a new message behind an empty first fragment of another one.
"""

from __future__ import annotations

from typing import Final

__all__ = ["FrameHeads"]

_FIN: Final = 0x80
_MASK: Final = 0x80
_MASK_BYTES: Final = 4
_CONTINUATION, _MESSAGES = 0, (1, 2)
_EXTENDED_BYTES: Final = {126: 2, 127: 8}
"""Bytes of the length behind the head's first two, by the length in these."""

_LENGTHS: Final = {126: range(126, 1 << 16), 127: range(1 << 16, 1 << 63)}
"""Lengths that may be written so (RFC 6455 section 5.2)."""


class FrameHeads:
    """Follows the frames of one connection. The payloads are skipped."""

    __slots__ = ("_head", "_is_in_message", "_skipped", "fault")

    def __init__(self) -> None:
        self._head = bytearray()
        self._skipped = 0
        """Bytes that are left of the frame behind its head: the mask and the payload."""
        self._is_in_message = False
        """Whether the last fragment of a message is still to come."""
        self.fault: str | None = None
        """What was not valid. Nothing more may be passed to `valid_bytes` then."""

    def valid_bytes(self, data: bytes) -> int:
        """Return how many bytes may be read: all, or those before the frame at which `fault` was set."""
        at, begin, end = 0, 0, len(data)
        while at < end:
            if self._skipped:
                passed = min(self._skipped, end - at)
                self._skipped -= passed
                at += passed
                begin = at
                continue
            self._head.append(data[at])
            at += 1
            if len(self._head) >= 2:
                self._read_head()
            if self.fault is not None:
                return begin
            if not self._head:
                begin = at
        return end

    def _read_head(self) -> None:
        """Judge what is there of the head; begin to skip the rest of the frame when the head is complete."""
        first, second, *extended = self._head
        if not second & _MASK:
            self.fault = "a frame of a client must be masked"
            return
        flag = second & ~_MASK
        if len(extended) < _EXTENDED_BYTES.get(flag, 0):
            return
        length = int.from_bytes(extended, "big") if extended else flag
        if flag in _LENGTHS and length not in _LENGTHS[flag]:
            self.fault = "the length of a frame must be written in as few bytes as possible"
            return
        self._note_message(first & 0x0F, is_final=bool(first & _FIN))
        self._skipped = _MASK_BYTES + length
        self._head.clear()

    def _note_message(self, opcode: int, *, is_final: bool) -> None:
        """Follow the fragments of messages. Control frames may be between them."""
        if opcode == _CONTINUATION:
            if not self._is_in_message:
                self.fault = "a continuation must follow a fragment"
        elif opcode not in _MESSAGES:
            return
        elif self._is_in_message:
            self.fault = "a message must not begin before the last fragment of the one before"
        self._is_in_message = not is_final
