"""Which reads become a template, and what it contains."""

from __future__ import annotations

from typing import Any

import pytest

from streamworker.stream.coalesce import Coalescer
from streamworker.stream.template import MAX_BYTES, ChunkTemplate, learn_template
from tests.streams import chunk, data, listening

NOW = 1_000


def usual(delta: dict[str, Any], **members: Any) -> bytes:
    return data(chunk(delta) | {"id": "c", "created": 1} | members)


@pytest.mark.parametrize(
    ("delta", "around", "is_reasoning"),
    [
        ({"content": "a"}, (b'{"content":"', b'"}'), False),
        ({"role": "assistant", "content": "a"}, (b'{"role":"assistant","content":"', b'"}'), False),
        ({"content": "a", "refusal": None}, (b'{"content":"', b'","refusal":null}'), False),
        ({"reasoning_content": "a"}, (b'{"reasoning_content":"', b'"}'), True),
    ],
)
def test_template_of_a_usual_read_has_its_delta(
    delta: dict[str, Any], around: tuple[bytes, bytes], *, is_reasoning: bool
) -> None:
    """One chunk with one choice and one text."""
    read = usual(delta)
    template = learn_template(read)

    assert isinstance(template, ChunkTemplate)
    assert (template.choice, template.delta, template.is_reasoning) == (0, around, is_reasoning)
    assert read[template.text] == b'"a"'
    assert template.head + b"a" + template.tail == read


@pytest.mark.parametrize(
    "read",
    [
        b"",
        b"data: [DONE]\n\n",
        b": ping\n\n",
        b"data: {}\n\n",
        usual({"content": ""}),
        usual({"content": "a"})[:-1],
        usual({"content": "a"}) + usual({"content": "a"}),
        usual({"content": "a", "reasoning_content": "b"}),
        usual({"content": "a", "audio": {}}),
        usual({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}),
        usual({"content": "a"}, usage={"completion_tokens": 1}),
        usual({"content": "a"}, provider="x"),
        data(chunk({"content": "a"}, "stop")),
        data({"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": []}}]}),
        data({"choices": [{"index": n, "delta": {"content": "a"}} for n in (0, 1)]}),
        data({"error": {"message": '"content":"a"'}}),
        b"event: ping\n" + usual({"content": "a"}),
        usual({"content": "a" * MAX_BYTES}),
    ],
)
def test_template_of_another_read_is_none(read: bytes) -> None:
    """Anything but one chunk with one text and no other news is read in full."""
    assert learn_template(read) is None


def test_attempt_takes_a_read_like_the_last_one_by_its_text() -> None:
    """It counts as published, and the next event has the next `seq`."""
    attempt = listening()
    list(attempt.receive(usual({"content": "a"}), NOW))
    text = attempt.receive_usual(usual({"content": "b\u00e9"}))

    assert text == b'"b\xc3\xa9"'
    assert attempt.seq == 3
    assert (attempt.ledger.deltas, attempt.ledger.chunks, attempt.ledger.content_chars) == (2, 2, 3)


@pytest.mark.parametrize("inserted", [b'"', b"\\q", b"\n", b"\r", b"\x00", b"\xff", b"\\ud83d", b'","x":"'])
def test_attempt_leaves_a_text_that_is_not_a_valid_string_to_the_parser(inserted: bytes) -> None:
    """The template says nothing about the text itself."""
    attempt = listening()
    read = usual({"content": "ab"})
    list(attempt.receive(read, NOW))

    assert attempt.receive_usual(read.replace(b"ab", b"a" + inserted + b"b")) is None
    assert attempt.seq == 2


def test_attempt_after_another_read_learns_the_template_anew() -> None:
    """The reads in between may change what the same bytes mean: here the choice has ended, and goes on."""
    attempt = listening()
    list(attempt.receive(usual({"content": "a"}), NOW))
    assert attempt.receive_usual(usual({"content": "b"})) is not None
    list(attempt.receive(usual({}, id="c") + b"data: ", NOW))

    assert attempt.receive_usual(usual({"content": "c"})) is None


def test_attempt_gives_up_on_templates_that_are_of_no_use() -> None:
    """Some upstreams send other members in every chunk; learning costs as much as reading several chunks."""
    attempt = listening()
    learnt = 0
    for number in range(20):
        read = usual({"content": "a"}, obfuscation="x" * number)
        assert attempt.receive_usual(read) is None
        learnt += attempt.template is not None
        list(attempt.receive(read, NOW))

    assert learnt == 4


def test_attempt_that_merges_or_winds_up_takes_no_read_by_its_text() -> None:
    """Both treat a delta otherwise."""
    merging = listening(coalescer=Coalescer())
    list(merging.receive(usual({"content": "a"}), NOW))
    winding = listening()
    list(winding.receive(usual({"content": "a"}), NOW))
    assert winding.receive_usual(usual({"content": "b"})) is not None
    winding.wind_up("no more")

    assert merging.receive_usual(usual({"content": "b"})) is None
    assert winding.receive_usual(usual({"content": "c"})) is None
