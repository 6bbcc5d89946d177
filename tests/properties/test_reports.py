"""Known habits of upstreams: each case ends as it has to, for every chunking."""

from __future__ import annotations

import pytest

from tests.reports import (
    CASES,
    chunkings,
    content_of,
    ending_of,
    expected_content,
    expected_ending,
)
from tests.streams import play


@pytest.mark.parametrize("name", CASES)
def test_habit_gives_its_content_and_its_ending_for_every_chunking(name: str) -> None:
    """Text, reasoning, tool calls; status, error, finish reasons and usage."""
    case = CASES[name]
    for how, pieces in chunkings(name, case["stream"]).items():
        played = play(pieces)

        assert content_of(played) == expected_content(case), how
        assert ending_of(played.end, case) == expected_ending(case), how
