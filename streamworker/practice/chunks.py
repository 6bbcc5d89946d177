"""The chunks of one answer, in the shape that the script selects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.practice.script import Script
    from streamworker.practice.shapes import Shape
    from streamworker.practice.text import Piece


class Chunks:
    """Build the chunks of one answer, as JSON values."""

    def __init__(self, answer_id: str, script: Script, choices: int) -> None:
        self._id = answer_id
        self._logprobs = script.logprobs
        self._shape: Shape = script.speaks
        self._choices = choices
        self._number = 0
        kind = {"object": self._shape.object} if self._shape.object is not None else {}
        self._head: dict[str, Any] = {**kind, "model": script.name, **self._shape.chunk}
        last = {"object": self._shape.last_object} if self._shape.last_object is not None else {}
        self._last: dict[str, Any] = {**last, **self._shape.last_chunk}

    def role(self, choice: int, usage: dict[str, Any] | None) -> dict[str, Any]:
        """Return the chunk with the delta that has only a role."""
        return self.chunk([self._choice(choice, dict(self._shape.first_delta))], usage)

    def said(
        self, pieces: Sequence[Piece], finishes: dict[int, str], usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Return the chunk with pieces of one or more choices; `finishes` has the finish reason of those that end."""
        choices = []
        for piece in pieces:
            choice = self._choice(piece.choice, self._delta(piece), finishes.get(piece.choice))
            if self._shape.repeats_text:
                choice["text"] = piece.content
            if self._logprobs and piece.content:
                choice["logprobs"] = {"content": [_logprob(piece.content)], "refusal": None}
            choices.append(choice)
        return self.chunk(choices, usage, is_last=bool(finishes))

    def finish(self, choice: int, reason: str | None, usage: dict[str, Any] | None) -> dict[str, Any]:
        """Return the chunk with a finish reason in a separate delta."""
        return self.chunk([self._choice(choice, dict(self._shape.last_delta), reason)], usage, is_last=True)

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the last chunk, which has usage and no choices."""
        return self.chunk([], usage)

    def chunk(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None, *, is_last: bool = False
    ) -> dict[str, Any]:
        """Return a chunk with these choices; the shape decides where `usage` is."""
        shape = self._shape
        whole = {"id": self._next_id(), **self._head, "choices": choices}
        if is_last:
            whole |= self._last
        if shape.padding:
            whole["obfuscation"] = "xY1"[: 1 + self._number % 3]
        if shape.null_usage:
            whole["usage"] = None
        return whole if usage is None else self._with_usage(whole, usage)

    def _with_usage(self, whole: dict[str, Any], usage: dict[str, Any]) -> dict[str, Any]:
        where = self._shape.usage
        if where == "choice":
            whole["choices"][-1]["usage"] = usage
        if where in {"x_groq", "both"}:
            whole["x_groq"] = {"id": "req_practice", "usage": usage}
        return whole if where in {"choice", "x_groq"} else whole | {"usage": usage}

    def _choice(self, index: int, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        shape = self._shape
        choice: dict[str, Any] = {"index": index} if shape.has_index or self._choices > 1 else {}
        choice["delta"] = {**shape.delta, **delta} if shape.delta else delta
        choice |= shape.choice
        if finish_reason is not None:
            choice |= {"finish_reason": finish_reason, **shape.last_choice}
        return choice

    def _delta(self, piece: Piece) -> dict[str, Any]:
        return {**self._shape.first_delta, **piece.delta} if self._shape.role == "each" else piece.delta

    def _next_id(self) -> str:
        self._number += 1
        match self._shape.id:
            case "empty":
                return ""
            case "each":
                return f"{self._id}-{self._number}"
            case _:
                return self._id


def _logprob(text: str) -> dict[str, Any]:
    return {"token": text, "logprob": -0.25, "bytes": list(text.encode()), "top_logprobs": []}
