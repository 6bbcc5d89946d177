"""The whole completion as one JSON body: for requests without `stream`, and for scripts that refuse to stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamworker.practice import text

if TYPE_CHECKING:
    from streamworker.practice.calls import Call
    from streamworker.practice.moves import Answer


def completion(answer: Answer, call: Call) -> dict[str, Any]:
    """Return a chat.completion object, and count it in the call's record."""
    script, messages = answer.script, answer.chat.messages
    for piece in text.pieces(script, messages, answer.choices):
        call.deltas_sent += 1
        call.sent.content_chars += len(piece.content)
        call.sent.reasoning_chars += len(piece.reasoning)
    choices = [
        {
            "index": choice,
            "message": text.message(script, messages, choice),
            "finish_reason": answer.finish_reason,
        }
        for choice in range(answer.choices)
    ]
    whole: dict[str, Any] = {
        "id": answer.answer_id,
        "object": "chat.completion",
        "model": script.name,
        "choices": choices,
    }
    if script.speaks.usage != "none":
        call.sent.usage = whole["usage"] = answer.usage(answer.total)
    return whole
