"""The texts for people with which a run refuses an input or stops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.batch.index import State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.batch.index import LineIndex
    from streamworker.batch.intake import Intake
    from streamworker.batch.restore import Restore

__all__ = ["changes_text", "count_of_lines", "faults_text", "named_topics", "unfinished_text"]

_SHOWN_UNKNOWN = 20


def faults_text(name: str, intake: Intake) -> str:
    """Return which lines of an input are not valid, and what to do."""
    shown = [f"  line {number}: {fault.code.code}: {fault.message}" for number, fault in intake.faults]
    if (more := intake.faulty - len(shown)) > 0:
        shown.append(f"  and {more:,} more")
    return (
        f"{name}: {count_of_lines(intake.faulty)} not valid; nothing was sent\n"
        + "\n".join(shown)
        + "\ncorrect them, or use --skip-invalid to write them to the error file"
    )


def changes_text(name: str, restore: Restore) -> str:
    """Return which lines of an input were edited since they were done, and what to do."""
    shown = ", ".join(map(str, sorted(restore.changed)))
    more = restore.changes - len(restore.changed)
    return (
        f"{name}: {count_of_lines(restore.changes)} done, and edited since (line {shown}"
        + (f", and {more:,} more" if more else "")
        + "); nothing was sent\nuse --changed rerun to run them again, or --changed keep to keep their results"
    )


def unfinished_text(index: LineIndex, reason: str) -> str:
    """Return what has become of the lines of a run that has stopped, and how to go on."""
    pending, submitted, unknown = (
        index.counts[state] for state in (State.PENDING, State.SUBMITTED, State.UNKNOWN)
    )
    parts = [f"{index.ended:,} of {len(index):,} lines are done"]
    parts += [f"{submitted:,} are in flight and go on"] if submitted else []
    parts += [f"{pending:,} are not submitted"] if pending else []
    text = (f"{reason}: " if reason else "") + ", ".join(parts)
    if not unknown:
        return f"{text}; run the same command again to go on"
    shown = [index.numbers[line] for line in index.lines_in(State.UNKNOWN)][:_SHOWN_UNKNOWN]
    return (
        f"{text}; of {unknown:,} nothing is known, because retention has deleted their records (line "
        f"{', '.join(map(str, shown))}{', ...' if unknown > len(shown) else ''}): "
        "they may have been paid for; --resubmit-unknown runs them again"
    )


def count_of_lines(count: int) -> str:
    """Return a number of lines with its verb."""
    return f"{count:,} line is" if count == 1 else f"{count:,} lines are"


def named_topics(topics: Mapping[str, str]) -> str:
    """Return topics with their roles, as the record of a run has them."""
    return ", ".join(f"{role} {topic}" for role, topic in topics.items())
