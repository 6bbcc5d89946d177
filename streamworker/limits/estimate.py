"""What a call will probably cost in tokens, for upstreams that limit tokens per minute.

A reservation, not an account: it is settled when the usage is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from streamworker.stream.usage import BYTES_PER_TOKEN
from streamworker.wire.json import InvalidJSON, decode

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["TokenEstimate", "estimate_tokens"]

_PROMPT = ("messages", "tools", "functions", "response_format")
_OUTPUT = ("max_completion_tokens", "max_tokens")
_MOST = 1 << 40


class TokenEstimate(NamedTuple):
    """Tokens of the prompt, and of each completion if the request says how many it may have."""

    prompt: int
    completion: int | None = None
    choices: int = 1

    def tokens(self, usual_completion: float) -> float:
        """Return the whole; `usual_completion` stands in for what the request does not say."""
        return self.prompt + self.choices * (usual_completion if self.completion is None else self.completion)


def estimate_tokens(request: Mapping[str, bytes | memoryview]) -> TokenEstimate:
    """Estimate from the members of a request, as raw JSON."""
    prompt = sum(len(bytes(request[name])) for name in _PROMPT if name in request)
    completion = next((count for name in _OUTPUT if (count := _count(request.get(name)))), None)
    return TokenEstimate(-(-prompt // BYTES_PER_TOKEN), completion, _count(request.get("n")) or 1)


def _count(raw: bytes | memoryview | None) -> int | None:
    """Return a positive integer, None for all else: the upstream will say what is wrong with it."""
    if raw is None:
        return None
    try:
        value = decode(bytes(raw))
    except InvalidJSON:
        return None
    return value if type(value) is int and 0 < value < _MOST else None
