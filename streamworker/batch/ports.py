"""What the engine needs of its surroundings: the input, the output, and a place for the run's record.

`files` implements them for local files. Another program, such as an HTTP API, may keep its files elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from array import array
    from collections.abc import AsyncIterator, Mapping, Sequence

    from streamworker.batch.index import LineIndex
    from streamworker.batch.plan import PriorLine
    from streamworker.batch.record import RunRecord

__all__ = ["BatchInput", "BatchOutput", "PriorEntry", "RunStore"]


class PriorEntry(NamedTuple):
    """A line that an earlier run has written. `file` is 0 for OUTPUT and 1 for ERRORS, `offset` the line's in it.

    `is_retried` marks an error line whose request is being run again: it counts as not done.
    """

    file: int
    offset: int
    line: PriorLine
    is_retried: bool = False


class BatchInput(Protocol):
    """A file of lines that does not change while the engine runs."""

    @property
    def name(self) -> str:
        """The file's name in messages."""

    def chunks(self) -> AsyncIterator[bytes]:
        """Yield the file from its beginning."""

    async def read(self, offset: int, length: int) -> bytes:
        """Return a part of the file."""


class BatchOutput(Protocol):
    """The two output files. Their lines end with LF. All methods but `write` raise OutputError if the storage fails."""

    @property
    def buffered(self) -> int:
        """Bytes that were written and not flushed."""

    @property
    def is_finished(self) -> bool:
        """Whether the files that exist have their names."""

    @property
    def names(self) -> Sequence[str]:
        """The names of the files that exist, once they are finished."""

    @property
    def is_retrying(self) -> bool:
        """Whether a round of `--retry-failed` is unfinished."""

    def prior(self) -> AsyncIterator[PriorEntry]:
        """Yield the lines of earlier runs."""

    async def begin(self, *, anew: bool) -> None:
        """Prepare to append; with `anew`, delete what earlier runs have written."""

    async def drop(self, offsets: Mapping[int, array[int]]) -> None:
        """Remove lines of earlier runs, given by their offsets, ascending, by file."""

    async def retry(self, offsets: Mapping[int, array[int]]) -> None:
        """Remove lines of earlier runs, and keep them aside until `finish`. `prior` yields them as `is_retried`."""

    def write(self, line: bytes, *, is_error: bool) -> None:
        """Append a line. It is in the file after `flush`."""

    async def flush(self) -> None:
        """Write the buffered lines, whole lines only."""

    async def sync(self) -> bool:
        """Flush, and make the files durable. Return whether a later run will find their lines."""

    async def finish(self, index: LineIndex, *, sort: bool) -> Sequence[str]:
        """Give the files their names; return the names of those that exist."""

    async def close(self) -> None:
        """Flush and release the files, finished or not."""


class RunStore(Protocol):
    """The place of the run's record."""

    async def load(self) -> RunRecord | None:
        """Return the record of an unfinished run. Raises OutputError."""

    async def save(self, record: RunRecord) -> None:
        """Replace the record, atomically and durably. Raises OutputError."""

    async def remove(self) -> None:
        """Remove the record: the run is finished."""
