"""Cases of upstreams' habits: bytes of an upstream, what they contain, and how the job has to end.

The project's own are in `tests/vectors`. Cases made from public reports are added where a file of them is present beside the
project.
"""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from streamworker.stream.usage import generated_text
from tests.completions import completed, fed_live
from tests.streams import bytewise, cut_at
from tests.vectors.upstream_streams import STREAMS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.model import UsageEvent
    from tests.streams import Played

__all__ = [
    "CASES",
    "chunkings",
    "content_of",
    "ending_of",
    "expected_content",
    "expected_ending",
]

_FILE = Path(__file__).parents[2] / "shared" / "vectors" / "reports" / "chat.json"


def _reported() -> dict[str, dict[str, Any]]:
    if not _FILE.exists():
        return {}
    cases = {case["name"]: case for case in json.loads(_FILE.read_bytes())}
    return {name: case | {"stream": base64.b64decode(case["input_b64"])} for name, case in cases.items()}


CASES: dict[str, dict[str, Any]] = STREAMS | _reported()


def chunkings(name: str, stream: bytes) -> dict[str, list[bytes]]:
    """Whole, byte by byte, and at random positions; the case's name is the seed."""
    chance = random.Random(name)
    return {"whole": [stream], "byte by byte": list(bytewise(stream))} | {
        f"at random {number}": cut_at(stream, [chance.randrange(len(stream) + 1) for _ in range(number * 3)])
        for number in range(1, 9)
    }


def content_of(played: Played) -> dict[str, Any]:
    """Return what the deltas contain, in the form of the cases."""
    texts: dict[str, str] = {}
    reasonings: dict[str, str] = {}
    for event in played.deltas:
        if event.choice is not None:
            text, reasoning, _ = generated_text(event.delta)
            _append(texts, str(event.choice), text)
            _append(reasonings, str(event.choice), reasoning)
    return {"text_by_choice": texts, "reasoning_by_choice": reasonings, "tool_calls": _tool_calls(played)}


def expected_content(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the deltas of a case have to contain."""
    expect = case["expect"]
    return {name: expect[name] for name in ("text_by_choice", "reasoning_by_choice", "tool_calls")}


def ending_of(end: UsageEvent, case: Mapping[str, Any]) -> dict[str, Any]:
    """Return the members of a terminal event that the case states."""
    found: dict[str, Any] = {"status": end.status.value}
    if "fin" not in case["want"]:
        found["finish_reasons"] = end.finish_reasons
    if "usage" not in case["want"]:
        found["usage"] = end.usage if end.usage_source in {"upstream", "upstream_partial"} else None
    error = msgspec.to_builtins(end.error) or {}
    want = case["want"]
    found |= {name: error.get(key) for name, key in _ERROR_MEMBERS.items() if name in want}
    if "words" in want:
        found["words"] = want["words"] if want["words"] in error.get("message", "") else error.get("message")
    if "usage_source" in want:
        found["usage_source"] = end.usage_source.value
    return found


def expected_ending(case: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the terminal event of a case has to state."""
    want = {name: value for name, value in case["want"].items() if name not in {"fin", "usage"}}
    for name, key in (("fin", "finish_reasons"), ("usage", "usage")):
        if name not in case["want"]:
            want[key] = case["expect"][key]
    return want


_ERROR_MEMBERS = {"error_code": "code", "retriable": "retriable"}


def _append(texts: dict[str, str], choice: str, text: str) -> None:
    if text:
        texts[choice] = texts.get(choice, "") + text


def _tool_calls(played: Played) -> list[dict[str, Any]]:
    if not any(event.delta.get("tool_calls") for event in played.deltas):
        return []
    calls = [
        (choice["index"], number, call)
        for choice in completed(fed_live(played))["choices"]
        for number, call in enumerate(choice["message"].get("tool_calls") or ())
    ]
    return [
        {"choice": choice, "index": number, "id": call["id"]} | call["function"]
        for choice, number, call in calls
    ]
