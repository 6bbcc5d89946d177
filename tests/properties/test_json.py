"""JSON values survive a round trip."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from streamworker.wire.json import InvalidJSON, decode, decode_strict, encode, replace_surrogates
from tests.properties.strategies import CHUNK_LIKE, JSON, escaped

ANY_TEXT = st.text(st.characters() | st.characters(categories=["Cs"]))


@given(JSON)
def test_json_value_written_and_read_is_the_same(value: Any) -> None:
    """Any value with valid strings survives, on the strict and on the tolerant path."""
    assert decode(encode(value)) == value
    assert decode_strict(encode(value)) == value


@given(st.integers(-(10**300), 10**300))
def test_json_integers_of_any_size_are_exact(number: int) -> None:
    """Strict and tolerant decoding agree and never return a float."""
    assert decode(b"[%d]" % number) == decode(b'["\\ud83d",%d]' % number)[1:] == [number]
    assert encode(number) == b"%d" % number


@given(CHUNK_LIKE)
def test_json_any_value_can_be_written(value: Any) -> None:
    """Lone surrogates included; the result is UTF-8 that any decoder accepts."""
    clean = replace_surrogates(value)

    assert json.loads(encode(value).decode()) == json.loads(encode(clean).decode()) == clean


@given(ANY_TEXT)
def test_replace_surrogates_leaves_what_utf8_can_hold_and_nothing_else(text: str) -> None:
    """Valid text is unchanged; each lone surrogate becomes one U+FFFD; pairs are joined."""
    clean = replace_surrogates(text)

    assert clean.encode().decode() == clean
    assert clean == json.loads(json.dumps(text)).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert replace_surrogates(clean) == clean


@given(CHUNK_LIKE)
def test_json_escaped_surrogates_are_read_as_by_the_standard_library(value: Any) -> None:
    """The tolerant path accepts lone surrogates and changes nothing else."""
    assert decode(escaped(value)) == json.loads(escaped(value))


@given(st.binary(max_size=40) | st.text('[]{}":,\\ud83\n019eE+-.tfn ', max_size=40).map(str.encode))
def test_json_any_bytes_are_read_or_refused(text: bytes) -> None:
    """A value or `InvalidJSON`, nothing else, and every value can be encoded."""
    try:
        value = decode(text)
    except InvalidJSON as refused:
        assert str(refused)  # noqa: PT017  both outcomes are right, each with its own claim
    else:
        assert decode(encode(value)) == replace_surrogates(value)
