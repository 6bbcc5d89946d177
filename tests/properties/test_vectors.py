"""The parser against vectors from the public test suites of the web platform and of other clients."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

import pytest

from tests.brokers.requirement import need
from tests.streams import bytewise, cut_at, parse

FOLDER = Path(__file__).parents[3] / "shared" / "vectors" / "sse"
VECTORS = {
    f"{file.stem}: {vector['name']}": vector
    for file in sorted(FOLDER.glob("*.json"))
    for vector in json.loads(file.read_bytes())
}


def answer(pieces: list[bytes]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Parse, and say it in the vectors' words."""
    parsed = parse(pieces, max_event_bytes=1 << 27)
    events = [
        {"event": event.type, "data": event.text, "id": event.last_event_id, "retry": event.retry}
        for event in parsed.events
    ]
    return events, {"last_event_id": parsed.last_event_id, "reconnection_time": parsed.reconnection_time}


def cuttings(vector: dict[str, Any], stream: bytes) -> dict[str, list[bytes]]:
    """Whole, everywhere, where the source cut it, and at random; the seed is the vector's name."""
    chance = random.Random(vector["name"])
    return {
        "whole": [stream],
        "bytewise": list(bytewise(stream)),
        "as the source cut it": cut_at(stream, vector.get("splits", [])),
    } | {
        f"at random {number}": cut_at(stream, [chance.randrange(len(stream) + 1) for _ in range(number * 3)])
        for number in range(1, 6)
    }


@pytest.mark.parametrize("name", VECTORS or ["none"])
def test_parser_vector_gives_the_same_events_and_state_under_every_cut(name: str) -> None:
    """Event, data, ID and retry of each event, and what the parser remembers at the end."""
    if not VECTORS:
        need(
            f"the vectors are not part of the project, and there is no folder {'/'.join(FOLDER.parts[-3:])} beside it"
        )
    vector = VECTORS[name]
    stream = base64.b64decode(vector["input_b64"])
    expected = (vector["expect"], vector["state"])

    assert {how: answer(pieces) for how, pieces in cuttings(vector, stream).items()} == dict.fromkeys(
        cuttings(vector, stream), expected
    )
