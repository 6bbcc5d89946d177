"""What has become of each line: states, accounts, and the lines of the output files that follow from an ending."""

from __future__ import annotations

from array import array
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from streamworker.batch.accounting import Accounts, tokens_of
from streamworker.batch.index import State
from streamworker.batch.output import error_line, is_completed, local_error_line, output_line
from streamworker.batch.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from streamworker.batch.identity import JobRef
    from streamworker.batch.index import LineIndex
    from streamworker.batch.output import EndedJob
    from streamworker.batch.ports import BatchOutput
    from streamworker.batch.progress import Snapshot

__all__ = ["Ledger"]

_OPEN = frozenset({State.PENDING, State.SUBMITTED, State.UNKNOWN})
_REFUSALS = frozenset({"auth", "quota"})


class Ledger:
    """The only place that ends a line, so that each is written once."""

    def __init__(self, index: LineIndex, output: BatchOutput, clock: Callable[[], float]) -> None:
        self.index = index
        self.accounts = Accounts()
        self._chunks: deque[tuple[float, array[int]]] = (
            deque()
        )  # time and lines of what this process has submitted
        self._name: tuple[int, str] | None = None  # custom id of the oldest line in flight
        self.failed_here = 0
        """Lines that failed in this start."""
        self.refusals = 0
        """Endings in a row with a refused key or an empty account."""
        self.is_dirty = False
        """Whether a line was written since the caller last cleared this."""
        self.is_expired = False
        """Whether the run's time is over: a job that it cancels from then on has expired."""
        self.last_refusal = ""
        self.on_ending: Callable[[], None] = _nothing
        self._output = output
        self._clock = clock
        self._progress = Progress(clock())

    @property
    def is_complete(self) -> bool:
        """Whether every line is in one of the files."""
        return self.index.ended == len(self.index)

    @property
    def submitted(self) -> int:
        """Number of lines in flight."""
        return self.index.counts[State.SUBMITTED]

    def line_of(self, ref: JobRef) -> int | None:
        """Return the line whose ending a job's would be; None if it has ended, or another round of it counts."""
        line = self.index.find(ref.digest)
        if line is None or self.index.state(line) not in _OPEN or self.index.round(line) != ref.round:
            return None
        return line

    def begin(self, lines: Iterable[int]) -> None:
        """Mark lines as submitted."""
        chunk = array("I", lines)
        for line in chunk:
            self.index.set_state(line, State.SUBMITTED)
        self._chunks.append((self._clock(), chunk))

    def revert(self, line: int) -> None:
        """Mark a line as not submitted: its job is not in the job topic."""
        self.index.set_state(line, State.PENDING)

    def oldest(self) -> tuple[int, float] | None:
        """Return the oldest line in flight that this process has submitted, and when; None if there is none."""
        while self._chunks:
            submitted, lines = self._chunks[0]
            while lines and not self.index.is_in(lines[0], State.SUBMITTED):
                del lines[0]
            if lines:
                return lines[0], submitted
            self._chunks.popleft()
        return None

    def name_oldest(self, line: int, custom_id: str) -> None:
        """Take the custom id of the oldest line in flight, for `snapshot`. Custom ids are not kept in memory."""
        self._name = (line, custom_id)

    def end(self, line: int, custom_id: str, job: EndedJob) -> None:
        """Write the line of a job that has ended."""
        if self.is_expired and job.status == "cancelled":
            job = msgspec.structs.replace(job, status="expired")
        digest = self.index.digest(line)
        tokens = tokens_of(job.usage)
        if is_completed(job):
            self._write(
                line, output_line(digest, custom_id, job), State.COMPLETED, tokens.total if tokens else 0
            )
            self.accounts.add_completed(job.usage, job.usage_source)
            self.refusals = 0
            return
        written, code = error_line(digest, custom_id, job)
        self._write(line, written, State.FAILED, tokens.total if tokens else 0)
        self.accounts.add_failed(code, job.usage, job.usage_source)
        self._note_failure(code, str((job.error or {}).get("message", "")))

    def fail(self, line: int, custom_id: str, code: str, message: str, *, retriable: bool = False) -> None:
        """Write the error line of a request that has no job, or whose job is not awaited any more."""
        text = local_error_line(self.index.digest(line), custom_id, code, message, retriable=retriable)
        self._write(line, text, State.FAILED, 0)
        self.accounts.add_failed(code, None, "none")
        self._note_failure(code, message)

    def refuse(self, line: int, text: bytes, code: str) -> None:
        """Write the error line of a faulty line of the input."""
        self._write(line, text, State.FAILED, 0)
        self.accounts.add_failed(code, None, "none")

    def since_ending(self) -> float:
        """Return the seconds since a line has ended, or since the start."""
        return self._progress.since_ending(self._clock())

    def snapshot(self) -> Snapshot:
        """Return the state of the run."""
        counts = self.index.counts
        return self._progress.snapshot(
            self._clock(),
            total=len(self.index),
            completed=counts[State.COMPLETED],
            failed=counts[State.FAILED],
            in_flight=counts[State.SUBMITTED],
            oldest=self._named_oldest(),
        )

    def _named_oldest(self) -> tuple[str, float] | None:
        if (oldest := self.oldest()) is None:
            return None
        line, submitted = oldest
        if self._name is not None and self._name[0] == line:
            return self._name[1], submitted
        return f"line {self.index.numbers[line]}", submitted

    def _write(self, line: int, text: bytes, state: State, tokens: int) -> None:
        self._output.write(text, is_error=state is State.FAILED)
        self.index.set_state(line, state)
        self.is_dirty = True
        self._progress.ended(self._clock(), tokens)
        self.on_ending()

    def _note_failure(self, code: str, message: str) -> None:
        self.failed_here += 1
        if code in _REFUSALS:
            self.refusals += 1
            self.last_refusal = f"{code}: {message}"
        else:
            self.refusals = 0


def _nothing() -> None: ...
