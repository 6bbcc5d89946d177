"""What a call will probably cost."""

from __future__ import annotations

import pytest

from streamworker.core.demand import Demand, demand_of

MESSAGES = b'[{"role":"user","content":"' + b"x" * 373 + b'"}]'  # 402 bytes


@pytest.mark.parametrize(
    ("members", "demand"),
    [
        ({}, Demand(101)),
        ({"max_tokens": b"500"}, Demand(101, 500)),
        ({"max_tokens": b"500", "max_completion_tokens": b"200"}, Demand(101, 200)),
        ({"max_tokens": b"500", "n": b"3"}, Demand(101, 500, 3)),
        ({"tools": b"[" + b" " * 39 + b"]"}, Demand(111)),
        ({"max_tokens": b'"many"', "n": b"null"}, Demand(101)),
        ({"max_tokens": b"-1", "n": b"0"}, Demand(101)),
        ({"max_tokens": b"1e9", "n": b"true"}, Demand(101)),
        ({"max_tokens": b"9" * 400}, Demand(101)),
    ],
)
def test_demand_is_estimated_from_the_request(members: dict[str, bytes], demand: Demand) -> None:
    """The prompt by its bytes, the completion by what the request allows; nonsense is the upstream's to refuse."""
    assert demand_of({"messages": MESSAGES, **members}) == demand


def test_demand_takes_the_usual_completion_where_the_request_does_not_say() -> None:
    """Once per choice."""
    assert Demand(100).tokens(50) == 150
    assert Demand(100, None, 2).tokens(50) == 200
    assert Demand(100, 10, 2).tokens(50) == 120
