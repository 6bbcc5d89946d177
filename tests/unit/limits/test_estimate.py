"""The estimate of a call's tokens."""

from __future__ import annotations

import pytest

from streamworker.limits.estimate import TokenEstimate, estimate_tokens

MESSAGES = b'[{"role":"user","content":"' + b"x" * 373 + b'"}]'  # 402 bytes


@pytest.mark.parametrize(
    ("members", "estimate"),
    [
        ({}, TokenEstimate(101)),
        ({"max_tokens": b"500"}, TokenEstimate(101, 500)),
        ({"max_tokens": b"500", "max_completion_tokens": b"200"}, TokenEstimate(101, 200)),
        ({"max_tokens": b"500", "n": b"3"}, TokenEstimate(101, 500, 3)),
        ({"tools": b"[" + b" " * 39 + b"]"}, TokenEstimate(111)),
        ({"max_tokens": b'"many"', "n": b"null"}, TokenEstimate(101)),
        ({"max_tokens": b"-1", "n": b"0"}, TokenEstimate(101)),
        ({"max_tokens": b"1e9", "n": b"true"}, TokenEstimate(101)),
        ({"max_tokens": b"9" * 400}, TokenEstimate(101)),
    ],
)
def test_estimate_of_a_request(members: dict[str, bytes], estimate: TokenEstimate) -> None:
    """The prompt by its bytes, the completion by the request's limit; invalid values are the upstream's to
    reject."""
    assert estimate_tokens({"messages": MESSAGES, **members}) == estimate


def test_estimate_uses_the_usual_completion_without_a_limit() -> None:
    """Once per choice."""
    assert TokenEstimate(100).tokens(50) == 150
    assert TokenEstimate(100, None, 2).tokens(50) == 200
    assert TokenEstimate(100, 10, 2).tokens(50) == 120
