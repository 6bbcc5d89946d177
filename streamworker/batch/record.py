"""The record of an unfinished run, `OUTPUT.run.json`."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["InputFacts", "RunRecord", "read_record", "write_record"]


class InputFacts(msgspec.Struct, frozen=True, kw_only=True):
    """The input of the run's first start, for people."""

    path: str
    bytes: int
    sha256: str


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, rename={"start": "from"}):
    """What a later start needs besides the output files. Times are in ms since the epoch.

    `start` has, by topic and partition, the offset from which on the run's records are: it is written before the first
    submission. That of the results topic advances with the output files. `round` counts the rounds of `--retry-failed`.
    """

    run: str
    created: int
    input: InputFacts
    topics: dict[str, str]
    """`jobs`, and `results` or `events`."""
    start: dict[str, dict[str, int]]
    expires: int | None = None
    round: int = 0
    v: int = 1

    def offsets(self, topic: str) -> dict[int, int]:
        """Return the offsets of a topic by partition."""
        return {int(partition): offset for partition, offset in self.start.get(topic, {}).items()}

    def with_offsets(self, topic: str, offsets: dict[int, int]) -> RunRecord:
        """Return a record with other offsets of a topic."""
        named = {str(partition): offset for partition, offset in sorted(offsets.items())}
        return msgspec.structs.replace(self, start={**self.start, topic: named})


def read_record(text: bytes) -> RunRecord:
    """Read a record. Raises ValueError."""
    try:
        record = msgspec.json.decode(text, type=RunRecord)
        partitions: list[Any] = [int(number) for offsets in record.start.values() for number in offsets]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"it is not the record of a run: {error}") from None
    if record.v != 1 or any(number < 0 for number in partitions):
        raise ValueError(f"it is the record of another version (v = {record.v})")
    return record


def write_record(record: RunRecord) -> bytes:
    """Return the record's text."""
    return msgspec.json.format(msgspec.json.encode(record), indent=1) + b"\n"
