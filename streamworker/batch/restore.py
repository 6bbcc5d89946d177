"""Read what earlier runs have written, and decide which of its lines stay."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Literal

from streamworker.batch.index import State
from streamworker.batch.plan import Verdict, judge

if TYPE_CHECKING:
    from streamworker.batch.accounting import Accounts
    from streamworker.batch.index import LineIndex
    from streamworker.batch.plan import PriorLine
    from streamworker.batch.ports import BatchOutput, PriorEntry

__all__ = ["Restore"]

SHOWN_CHANGED = 20


class Restore:
    """Sets the states of the lines that earlier runs have ended, and adds them to the accounts."""

    def __init__(
        self,
        index: LineIndex,
        accounts: Accounts,
        *,
        changed: Literal["fail", "keep", "rerun"],
        retry: Literal["retriable", "all"] | None,
        round_: int,
    ) -> None:
        """With `retry`, failed lines are selected to run again. `round_` is that of lines which are run again."""
        self.round = round_
        self.dropped: dict[int, array[int]] = {0: array("Q"), 1: array("Q")}
        """Offsets of lines that must be removed, by file."""
        self.retried: dict[int, array[int]] = {0: array("Q"), 1: array("Q")}
        """Offsets of error lines whose requests run again, by file."""
        self.retried_lines = array("I")
        self.continued = 0
        """Lines that an unfinished round of `--retry-failed` runs again."""
        self.changed: list[int] = []
        """The first lines of the input that are done with another body."""
        self.changes = 0
        self.absent = 0
        """Lines of the output that the input does not have."""
        self._index = index
        self._accounts = accounts
        self._policy = changed
        self._retry = retry

    @property
    def has_work(self) -> bool:
        """Whether lines must be removed from the output files."""
        return any(self.dropped.values()) or bool(self.retried_lines)

    async def run(self, output: BatchOutput) -> None:
        """Read the output files. Raises RunRefused, OutputError."""
        async for entry in output.prior():
            self._read(entry)

    def _read(self, entry: PriorEntry) -> None:
        verdict, line = judge(entry.line, self._index)
        if entry.is_retried:
            if verdict is Verdict.DONE and self._is_open(line):
                self.continued += 1
                self._index.set_round(line, self.round)
        elif verdict is Verdict.ABSENT:
            self.absent += 1
        elif verdict is Verdict.CHANGED and (entry.line.is_error or self._policy == "rerun"):
            self.dropped[entry.file].append(entry.offset)  # a failed line was edited: the new body runs
        elif not self._is_open(line):
            self.dropped[entry.file].append(entry.offset)  # the line is in the files twice
        else:
            if verdict is Verdict.CHANGED:
                self._note_change(line)
            self._end(entry, line)

    def _is_open(self, line: int) -> bool:
        return self._index.state(line) in {State.PENDING, State.FAULTY}

    def _note_change(self, line: int) -> None:
        self.changes += 1
        if len(self.changed) < SHOWN_CHANGED:
            self.changed.append(self._index.numbers[line])

    def _end(self, entry: PriorEntry, line: int) -> None:
        prior = entry.line
        if not prior.is_error:
            self._accounts.add_completed(prior.usage, prior.usage_source)
            self._index.set_state(line, State.COMPLETED)
        elif self._is_selected(prior, line):
            self.retried[entry.file].append(entry.offset)
            self.retried_lines.append(line)
            self._index.set_round(line, self.round)
        else:
            self._accounts.add_failed(prior.code, prior.usage, prior.usage_source)
            self._index.set_state(line, State.FAILED)

    def _is_selected(self, prior: PriorLine, line: int) -> bool:
        if self._retry is None or self._index.fault(line):
            return False
        return self._retry == "all" or prior.retriable
