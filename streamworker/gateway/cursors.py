"""Cursors: the text with which a client resumes behind an event.

::

    <partition>.<offset>.<seq>.<attempt8>        behind an event
    <partition>.<offset>.<seq>.<attempt8>.end    behind a terminal event
    <partition>.<offset>.w                       a place: behind every record before this offset

`attempt8` is the CRC-32 of the attempt's id, as 8 hexadecimal digits. A cursor is not secret and grants nothing. Whether
the record at its offset still is the event that it names is checked when it is used (`Cursor.names`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple
from zlib import crc32

from streamworker.gateway.feeds import InvalidCursor

if TYPE_CHECKING:
    from streamworker.handover import EventHead

__all__ = ["Cursor", "attempt8"]

MAX_OFFSET = (1 << 63) - 1
MAX_PARTITION = (1 << 31) - 1

_NUMBER = r"0|[1-9][0-9]{0,18}"
_PATTERN = re.compile(
    rf"(?P<partition>{_NUMBER})\.(?P<offset>{_NUMBER})\."
    rf"(?:w|(?P<seq>{_NUMBER})\.(?P<attempt8>[0-9a-f]{{8}})(?P<end>\.end)?)",
    re.ASCII,
)


def attempt8(attempt: str) -> str:
    """Return the CRC-32 of an attempt's id as 8 hexadecimal digits."""
    return f"{crc32(attempt.encode(errors='surrogatepass')):08x}"


class Cursor(NamedTuple):
    """A cursor. A place has no `attempt8`; its `offset` is the first one that it does not cover."""

    partition: int
    offset: int
    seq: int = -1
    attempt8: str = ""
    is_end: bool = False

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """Read a cursor. Raises InvalidCursor."""
        found = _PATTERN.fullmatch(text)
        if found is None:
            raise InvalidCursor(text)
        partition, offset, seq = int(found["partition"]), int(found["offset"]), int(found["seq"] or 0)
        if partition > MAX_PARTITION or offset > MAX_OFFSET or seq > MAX_OFFSET:
            raise InvalidCursor(text)
        if found["attempt8"] is None:
            return cls(partition, offset)
        return cls(partition, offset, seq, found["attempt8"], found["end"] is not None)

    @property
    def is_place(self) -> bool:
        """Whether it names no event."""
        return not self.attempt8

    def names(self, offset: int, head: EventHead) -> bool:
        """Whether this is the event that the cursor names. Only events of the cursor's job may be passed."""
        return (
            offset == self.offset
            and head.seq == self.seq
            and attempt8(head.attempt) == self.attempt8
            and (head.type == "usage") == self.is_end
        )

    def __str__(self) -> str:
        if not self.attempt8:
            return f"{self.partition}.{self.offset}.w"
        end = ".end" if self.is_end else ""
        return f"{self.partition}.{self.offset}.{self.seq}.{self.attempt8}{end}"
