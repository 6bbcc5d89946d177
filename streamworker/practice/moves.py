"""The writes of one answer: the bytes of each, and what they contain. Nothing is sent here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from streamworker.practice import text
from streamworker.practice.chunks import Chunks
from streamworker.practice.events import Events

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamworker.practice.request import ChatRequest
    from streamworker.practice.script import Script

RUNNING = "running"


class Move(NamedTuple):
    """One write. `deltas` and `chunks` are a reader's counts; `pieces` excludes deltas with only a role or a finish reason."""

    data: bytes
    deltas: int = 0
    chunks: int = 0
    pieces: tuple[text.Piece, ...] = ()
    usage: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The content of the answer to one request."""

    answer_id: str
    script: Script
    chat: ChatRequest
    choices: int

    def usage(self, completion: int) -> dict[str, Any]:
        """Return the usage after this number of pieces."""
        return text.usage(self.script, text.prompt_tokens(self.chat.messages), completion)

    @property
    def total(self) -> int:
        """The number of pieces."""
        return text.count(self.script, self.choices)

    @property
    def finish_reason(self) -> str | None:
        """The finish reason of every choice."""
        shape = self.script.speaks
        if self.script.finish is not None:
            return None if self.script.finish == "none" else self.script.finish
        if shape.content == "audio":  # its last choice has an expiry and no finish reason
            return None
        return shape.calls_finish if self.script.tool_calls else "stop"


class Moves:
    """The writes of an answer without a fault, in order: `opening`, `pieces`, `closing`."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._script = answer.script
        self._shape = answer.script.speaks
        self._reason = answer.finish_reason
        self._total = answer.total
        self.chunks = Chunks(answer.answer_id, answer.script, answer.choices)
        self.events = Events(answer.script.format, self._shape.keepalive)

    def opening(self) -> Iterator[Move]:
        """Yield the writes before the first piece: chunks without choices, and the role."""
        for chunk in self._shape.opening:
            yield self._move(dict(chunk))
        if self._shape.role == "first":
            for choice in range(self._answer.choices):
                usage = self._running(0)
                yield self._move(self.chunks.role(choice, usage), usage=usage)

    def pieces(self) -> Iterator[Move]:
        """Yield every piece, or one piece of all choices at a time; each choice finishes with its last piece."""
        number = 0
        for group in self._groups():
            number += len(group)
            is_last = self._shape.ends == "last" and number > self._total - self._answer.choices
            finishes = {piece.choice: self._reason for piece in group if self._reason} if is_last else {}
            usage = self._usage_beside(number, is_last=is_last)
            yield self._move(self.chunks.said(group, finishes, usage), pieces=group, usage=usage)

    def closing(self) -> Iterator[Move]:
        """Yield the writes after the last piece: finish reasons, usage, annotations, the sentinel."""
        if self._shape.ends == "own" or not self._total:
            yield from self._finishes()
        usage = self._answer.usage(self._total)
        if self._shape.usage == "again":
            for choice in range(self._answer.choices):
                told = usage if choice == self._answer.choices - 1 else None
                yield self._move(self.chunks.finish(choice, self._reason, told), usage=told)
        if self._shape.usage == "own" and self._answer.chat.include_usage:
            yield self._move(self.chunks.usage(usage), usage=usage)
        for chunk in self._shape.closing:
            yield self._move(dict(chunk))
        if self._shape.done and not self._script.no_done:
            yield Move(self.events.done(self._script.done))

    def length(self) -> int:
        """Return the number of bytes of the whole body."""
        again = Moves(self._answer)
        said = (len(move.data) for part in (again.opening, again.pieces, again.closing) for move in part())
        return len(self.events.start) + sum(said)

    def _groups(self) -> Iterator[tuple[text.Piece, ...]]:
        pieces = text.pieces(self._script, self._answer.chat.messages, self._answer.choices)
        if not self._script.packed:
            return ((piece,) for piece in pieces)
        return (tuple(reversed(group)) for group in zip(*[pieces] * self._answer.choices, strict=True))

    def _finishes(self) -> Iterator[Move]:
        for choice in range(self._answer.choices):
            told = self._shape.usage not in {"own", "again", "none"} and choice == self._answer.choices - 1
            usage = self._answer.usage(self._total) if told else self._running(self._total)
            yield self._move(self.chunks.finish(choice, self._reason, usage), usage=usage)

    def _usage_beside(self, number: int, *, is_last: bool) -> dict[str, Any] | None:
        """Return the usage that is sent with piece `number` of all pieces."""
        told = is_last and number == self._total and self._shape.usage not in {"own", "again", "none"}
        return self._answer.usage(number) if told else self._running(number)

    def _running(self, number: int) -> dict[str, Any] | None:
        return self._answer.usage(number) if self._shape.usage == RUNNING else None

    def _move(
        self,
        chunk: dict[str, Any],
        *,
        pieces: tuple[text.Piece, ...] = (),
        usage: dict[str, Any] | None = None,
    ) -> Move:
        return Move(self.events.json(chunk), len(chunk["choices"]), 1, pieces, usage)
