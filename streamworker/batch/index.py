"""The index of a batch file: some 60 bytes per line, whatever the size of the lines.

Arrays of plain values and two hash tables with open addressing, because a million Python objects would need several times as
much. Bodies are never kept: a line is read again from the file when it is submitted.
"""

from __future__ import annotations

from array import array
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LineIndex", "State"]

_EMPTY = 0xFFFFFFFF
_DIGEST = 16


class State(IntEnum):
    """What has become of a line."""

    PENDING = 0
    SUBMITTED = 1
    COMPLETED = 2
    FAILED = 3
    UNKNOWN = 4
    """Retention deleted the records that would show whether the line was submitted or how it ended."""
    FAULTY = 5
    """The line is not valid, and its error line is not yet written."""


class LineIndex:
    """The lines of a file, in its order. Lines are named by their position in the index, from 0."""

    def __init__(self) -> None:
        self.offsets = array("Q")
        self.lengths = array("I")
        self.numbers = array("I")
        """Line numbers in the file."""
        self.counts = [0] * len(State)
        """Number of lines by state."""
        self._digests = bytearray()
        self._names = array("q")  # hashes of the custom ids
        self._states = bytearray()
        self._rounds = bytearray()
        self._faults = bytearray()
        self._by_digest = _Table()
        self._by_name = _Table()

    def __len__(self) -> int:
        """Return the number of lines."""
        return len(self._states)

    def add(
        self,
        digest: bytes,
        custom_id: str | None,
        position: tuple[int, int, int],
        state: State = State.PENDING,
        fault: int = 0,
    ) -> int:
        """Append a line; return its place. `position` is number, offset and length."""
        line = len(self._states)
        number, offset, length = position
        self.numbers.append(number)
        self.offsets.append(offset)
        self.lengths.append(min(length, _EMPTY))
        self._digests += digest
        name = hash(custom_id)
        self._names.append(name)
        self._states.append(state)
        self._rounds.append(0)
        self._faults.append(fault)
        self.counts[state] += 1
        self._by_digest.add(line, _hash_of(digest), self._digest_hash)
        if state is not State.FAULTY:
            self._by_name.add(line, name, self._name_hash)
        return line

    def digest(self, line: int) -> bytes:
        """Return a line's digest."""
        return bytes(self._digests[line * _DIGEST : line * _DIGEST + _DIGEST])

    def find(self, digest: bytes) -> int | None:
        """Return the line with this digest."""
        for line in self._by_digest.candidates(_hash_of(digest)):
            if self._digests.startswith(digest, line * _DIGEST):
                return line
        return None

    def named(self, custom_id: str) -> Iterator[int]:
        """Yield the valid lines whose custom id has this one's hash. More than one, or a wrong one, is improbable."""
        name = hash(custom_id)
        for line in self._by_name.candidates(name):
            if self._names[line] == name:
                yield line

    def state(self, line: int) -> State:
        """Return a line's state."""
        return State(self._states[line])

    def is_in(self, line: int, state: State) -> bool:
        """Whether a line is in a state."""
        return self._states[line] == state

    def set_state(self, line: int, state: State) -> None:
        """Change a line's state."""
        self.counts[self._states[line]] -= 1
        self.counts[state] += 1
        self._states[line] = state

    def fault(self, line: int) -> int:
        """Return the code of a faulty line; 0 for a valid one."""
        return self._faults[line]

    def round(self, line: int) -> int:
        """Return the round of a line's latest job."""
        return self._rounds[line]

    def set_round(self, line: int, round_: int) -> None:
        """Change the round of a line's job."""
        self._rounds[line] = round_

    def lines_in(self, *states: State) -> Iterator[int]:
        """Yield the lines in one of these states, in order. States may change meanwhile."""
        for line, state in enumerate(self._states):
            if state in states:
                yield line

    def next_in(self, state: State, start: int) -> int:
        """Return the first line from `start` on that is in a state; -1 if there is none."""
        return self._states.find(state, start)

    @property
    def ended(self) -> int:
        """Number of lines that are in one of the output files."""
        return self.counts[State.COMPLETED] + self.counts[State.FAILED]

    def _digest_hash(self, line: int) -> int:
        return _hash_of(self._digests[line * _DIGEST : line * _DIGEST + 8])

    def _name_hash(self, line: int) -> int:
        return self._names[line]


def _hash_of(digest: bytes | bytearray) -> int:
    return int.from_bytes(digest[:8], "little")


class _Table:
    """A hash table of line numbers with open addressing and linear probing. At most half of its slots are used."""

    def __init__(self) -> None:
        self._slots = array("I", [_EMPTY]) * 64
        self._used = 0

    def add(self, line: int, hash_: int, hash_of: _Hashed) -> None:
        if self._used * 2 >= len(self._slots):
            self._grow(hash_of)
        self._insert(line, hash_)
        self._used += 1

    def candidates(self, hash_: int) -> Iterator[int]:
        """Yield the lines whose hash may be this one."""
        slots, mask = self._slots, len(self._slots) - 1
        at = hash_ & mask
        while (line := slots[at]) != _EMPTY:
            yield line
            at = at + 1 & mask

    def _insert(self, line: int, hash_: int) -> None:
        slots, mask = self._slots, len(self._slots) - 1
        at = hash_ & mask
        while slots[at] != _EMPTY:
            at = at + 1 & mask
        slots[at] = line

    def _grow(self, hash_of: _Hashed) -> None:
        old = self._slots
        self._slots = array("I", [_EMPTY]) * (2 * len(old))
        for line in old:
            if line != _EMPTY:
                self._insert(line, hash_of(line))


if TYPE_CHECKING:
    from collections.abc import Callable

    _Hashed = Callable[[int], int]
