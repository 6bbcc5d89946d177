from urllib.parse import quote

import orjson
import pytest

from streamworker.practice import expected_text, expected_tool_calls, expected_usage
from streamworker.practice.script import ScriptError, parse
from streamworker.practice.text import WORDS, count, message, pieces
from tests.unit.practice.practice_client import MESSAGES


def test_text_depends_only_on_the_prompt() -> None:
    assert expected_text("p", MESSAGES) == expected_text("other", MESSAGES)
    assert expected_text("p", MESSAGES) != expected_text("p", [{"role": "user", "content": "Other."}])


def test_default_text_holds_every_awkward_word() -> None:
    (text,) = expected_text("p", MESSAGES)
    assert all(word in text for word in WORDS)


def test_choices_have_different_texts() -> None:
    assert len(set(expected_text("p?choices=3", MESSAGES))) == 3
    assert expected_text("p", MESSAGES, n=3) == expected_text("p?choices=3", MESSAGES, n=1)


@pytest.mark.parametrize("text", ["Ciao!", " a  b\n", "d'un tratto, «così»…", "🐟🐟"])
def test_given_text_is_sent_unchanged(text: str) -> None:
    assert expected_text(f"p?text={quote(text)}", MESSAGES) == [text]


def test_given_text_is_repeated_up_to_the_number_of_deltas() -> None:
    assert expected_text("p?text=ab%20cd%20&deltas=3", MESSAGES) == ["ab cd ab "]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ciao, a te!", ["Ciao", ", ", "a ", "te", "!"]),
        ("夜明けの港。", ["夜明", "けの", "港", "。"]),
        ("Tea は お茶", ["Tea ", "は ", "お茶"]),
    ],
)
def test_given_text_is_split_where_a_reader_expects_it(text: str, expected: list[str]) -> None:
    """Japanese and Chinese have no spaces, so a delta has at most two of their characters."""
    script = parse(f"p?text={quote(text)}")

    assert [piece.content for piece in pieces(script, MESSAGES, 1)] == expected


def test_given_thoughts_precede_the_text() -> None:
    """One delta per word, and in the message of a whole completion."""
    script = parse("p?thoughts=first%20this&text=then")

    assert [piece.delta for piece in pieces(script, MESSAGES, 1)] == [
        {"reasoning_content": "first "},
        {"reasoning_content": "this"},
        {"content": "then"},
    ]
    assert message(script, MESSAGES, 0)["reasoning_content"] == "first this"


@pytest.mark.parametrize("model", ["p?thoughts=", "p?thoughts=a&reasoning=2"])
def test_thoughts_that_contradict_are_refused(model: str) -> None:
    """Empty ones, and a second number of them."""
    with pytest.raises(ScriptError, match="thoughts"):
        parse(model)


@pytest.mark.parametrize("size", [1, 5, 100])
def test_big_delta_has_that_number_of_bytes_in_each_choice(size: int) -> None:
    firsts = [piece.content for piece in pieces(parse(f"p?deltas=2&big_delta={size}"), MESSAGES, 2)][:2]
    assert [len(text.encode()) for text in firsts] == [size, size]


@pytest.mark.parametrize(
    "model",
    [
        "p",
        "p?deltas=0",
        "p?deltas=2&reasoning&tool_calls=2",
        "p?text=a%20b%20c&tool_calls",
        "p?thoughts=a%20b,%20c&deltas=2",
    ],
)
def test_count_is_the_number_of_pieces(model: str) -> None:
    script = parse(model)
    assert count(script, 2) == len(list(pieces(script, MESSAGES, 2)))


def test_fragments_of_a_tool_call_add_up_to_the_expected_call() -> None:
    fragments = [piece.delta["tool_calls"][0] for piece in pieces(parse("p?deltas=0&tool_calls"), [], 1)]
    (expected,) = expected_tool_calls("p?tool_calls")
    arguments = "".join(fragment["function"]["arguments"] for fragment in fragments)
    assert fragments[0]["id"] == expected["id"]
    assert fragments[0]["function"]["name"] == expected["function"]["name"]
    assert arguments == expected["function"]["arguments"]
    assert orjson.loads(arguments) == {"place": "Zürich 🐟", "number": 0}


def test_usage_counts_prompt_words_and_deltas() -> None:
    assert expected_usage("p?deltas=3", MESSAGES) == {"prompt_tokens": 5, "completion_tokens": 3}
    own = expected_usage("p?deltas=3&usage=own", MESSAGES, n=2)
    assert own == {"prompt_tokens": 5, "completion_tokens": 6, "total_tokens": 11}
