"""The parser against cases with known events: the project's own, and public vectors where they are present.

Public vectors are read from a folder beside the project. Without it their test does not exist.
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.properties.sse_cases import CASES
from tests.streams import bytewise, cut_at, parse

FOLDER = Path(__file__).parents[3] / "shared" / "vectors" / "sse"
VECTORS = {
    f"{file.stem}: {vector['name']}": vector
    for file in sorted(FOLDER.glob("*.json"))
    for vector in json.loads(file.read_bytes())
}


def answer(pieces: list[bytes]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Parse; return events and state with the vectors' names."""
    parsed = parse(pieces, max_event_bytes=1 << 27)
    events = [
        {"event": event.type, "data": event.text, "id": event.last_event_id, "retry": event.retry}
        for event in parsed.events
    ]
    return events, {"last_event_id": parsed.last_event_id, "reconnection_time": parsed.reconnection_time}


def chunkings(name: str, stream: bytes) -> dict[str, list[bytes]]:
    """Whole, byte by byte, and at random positions; the case's name is the seed."""
    chance = random.Random(name)
    return {"whole": [stream], "byte by byte": list(bytewise(stream))} | {
        f"at random {number}": cut_at(stream, [chance.randrange(len(stream) + 1) for _ in range(number * 3)])
        for number in range(1, 6)
    }


@pytest.mark.parametrize("name", CASES)
def test_parser_case_gives_the_standards_events_for_every_chunking(name: str) -> None:
    """Event, data, id and retry of each event, and the parser's state at the end."""
    case = CASES[name]
    state = {"last_event_id": case.last_event_id, "reconnection_time": case.reconnection_time}
    expected = ([event._asdict() for event in case.events], state)
    cuttings = chunkings(name, case.stream)

    assert {how: answer(pieces) for how, pieces in cuttings.items()} == dict.fromkeys(cuttings, expected)


def check_vector(name: str) -> None:
    """Compare a vector of the public test suites of the web platform and of other clients."""
    vector = VECTORS[name]
    stream = base64.b64decode(vector["input_b64"])
    expected = (vector["expect"], vector["state"])
    cuttings = chunkings(name, stream) | {"as the source cut it": cut_at(stream, vector.get("splits", []))}

    assert {how: answer(pieces) for how, pieces in cuttings.items()} == dict.fromkeys(cuttings, expected)


if VECTORS:

    @pytest.mark.parametrize("name", VECTORS)
    def test_parser_vector_gives_the_same_events_for_every_chunking(name: str) -> None:
        """Vectors of the public test suites of the web platform and of other clients."""
        check_vector(name)
