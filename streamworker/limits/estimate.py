"""Estimates a call's tokens, for upstreams that limit tokens per minute.

The estimate is reserved when the call begins and replaced by the reported usage when it ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from streamworker.text import BYTES_PER_TOKEN
from streamworker.wire.json import InvalidJSON, as_count, decode

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TokenEstimate", "estimate_tokens"]

_PROMPT = ("messages", "tools", "functions", "response_format")
_OUTPUT = ("max_completion_tokens", "max_tokens")


class TokenEstimate(NamedTuple):
    """Tokens of the prompt, and of each completion if the request limits them."""

    prompt: int
    completion: int | None = None
    choices: int = 1

    def tokens(self, usual_completion: float) -> float:
        """Return the tokens of the whole call. `usual_completion` replaces an unknown limit."""
        return self.prompt + self.choices * (usual_completion if self.completion is None else self.completion)


def estimate_tokens(request: Mapping[str, bytes | memoryview]) -> TokenEstimate:
    """Estimate a call's tokens from the members of its request, as raw JSON."""
    prompt = sum(len(bytes(request[name])) for name in _PROMPT if name in request)
    completion = next((count for name in _OUTPUT if (count := _count(request.get(name)))), None)
    return TokenEstimate(-(-prompt // BYTES_PER_TOKEN), completion, _count(request.get("n")) or 1)


def _count(raw: bytes | memoryview | None) -> int | None:
    """Return a positive integer, None for any other value: the upstream will reject it."""
    if raw is None:
        return None
    try:
        return as_count(decode(bytes(raw))) or None
    except InvalidJSON:
        return None
