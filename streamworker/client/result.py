"""The result of a job: its terminal event, and the whole completion."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from streamworker.client.errors import JobFailed
from streamworker.client.events import Ended, Started
from streamworker.stream.completion import CompletionAssembler

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.client.events import Event

__all__ = ["Result", "ResultAssembler", "result_of"]

MAX_COMPLETION_BYTES = 64 << 20
"""Largest completion that the client assembles itself."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a job ended, whatever its status.

    `completion` is an OpenAI `chat.completion` object as docs/completion.md describes it; None if the job had no delta,
    or if `omitted` names it.
    """

    job_id: str
    status: str
    completion: dict[str, Any] | None = field(repr=False)
    usage: dict[str, Any] | None
    usage_source: str
    error: dict[str, Any] | None
    metadata: dict[str, str] = field(repr=False)
    omitted: tuple[str, ...] = ()
    raw: dict[str, Any] = field(repr=False)
    """The record that it was made of: the result, or the terminal event."""

    @property
    def text(self) -> str:
        """The content of the first choice; empty if there is none."""
        return str(self._message.get("content") or "")

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The tool calls of the first choice."""
        return list(self._message.get("tool_calls") or ())

    def to_dict(self) -> dict[str, Any]:
        """Return the members, without `raw`, as a dictionary that can be encoded as JSON."""
        names = ("job_id", "status", "completion", "usage", "usage_source", "error", "metadata")
        return {name: getattr(self, name) for name in names} | {"omitted": list(self.omitted)}

    def raise_for_status(self) -> Self:
        """Return the result of a completed job. Raises JobFailed for any other status."""
        if self.status != "completed":
            raise JobFailed(self)
        return self

    @property
    def _message(self) -> dict[str, Any]:
        choices = (self.completion or {}).get("choices") or ()
        return choices[0]["message"] if choices else {}


def result_of(
    record: Mapping[str, Any], completion: dict[str, Any] | None, omitted: tuple[str, ...] = ()
) -> Result:
    """Return the result of a terminal event or of a result record."""
    return Result(
        job_id=record["job_id"],
        status=record["status"],
        completion=completion,
        usage=record["usage"],
        usage_source=record["usage_source"],
        error=record["error"],
        metadata=record["metadata"],
        omitted=omitted,
        raw=dict(record),
    )


class ResultAssembler:
    """Makes a result of a job's events."""

    def __init__(self) -> None:
        self._assembler = CompletionAssembler(limit_bytes=MAX_COMPLETION_BYTES)

    def add(self, event: Event) -> Result | None:
        """Take the next event of the valid attempt; return the result if it is the last one."""
        if isinstance(event, Started):
            self._assembler = CompletionAssembler(limit_bytes=MAX_COMPLETION_BYTES)
        self._assembler.read(event.raw)
        if not isinstance(event, Ended):
            return None
        if not event.is_whole:
            return result_of(event.raw, None, ("completion",))
        return result_of(event.raw, self._assembler.completion(), tuple(self._assembler.omitted))
