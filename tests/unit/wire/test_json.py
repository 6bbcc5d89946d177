"""JSON decoding and encoding: exact values, tolerant reading."""

from __future__ import annotations

from typing import Any

import pytest

from streamworker.model import ErrorCode, JobError
from streamworker.wire.json import (
    MAX_COUNT,
    MAX_DEPTH,
    InvalidJSON,
    as_count,
    decode,
    decode_lenient,
    decode_strict,
    encode,
    replace_surrogates,
)

HALF_FISH = "\ud83d"


def nested(levels: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return opening * levels + closing * levels


@pytest.mark.parametrize("number", [2**63, 2**64, -(2**64) - 1, 10**400])
def test_decode_integer_beyond_64_bits_stays_exact(number: int) -> None:
    """Integers of any size are kept exactly: ids and costs must not become floats."""
    text = str(number).encode()

    assert decode(text) == number
    assert encode(number) == text


def test_decode_text_with_lone_surrogate_keeps_big_integers_exact() -> None:
    """The tolerant path is as exact as the strict one."""
    assert decode(b'["\\ud83d",%d]' % 2**80) == [HALF_FISH, 2**80]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'"\\ud83d"', HALF_FISH),
        (b'"\\udc1f\\ud83d"', "\udc1f\ud83d"),
        (b'{"\\ud83d":1}', {HALF_FISH: 1}),
        (b'"\xff"', "\ufffd"),
        (b'["\xf0\x9f", 1.5]', ["\ufffd", 1.5]),
    ],
)
def test_decode_unclean_strings_reads_on(text: bytes, value: Any) -> None:
    """Lone surrogates are kept and invalid UTF-8 becomes U+FFFD; strict decoding rejects both."""
    assert decode(text) == value
    with pytest.raises(InvalidJSON):
        decode_strict(text)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"NaN",
        b"-Infinity",
        b'["\\ud83d",NaN]',
        b"1e999",
        b'["\\ud83d",1e999]',
        b'["\\ud83d",-1e999]',
        b"[1,]",
        b"{'a':1}",
        b"\xef\xbb\xbf{}",
        b"1" * 5000,
        b'"a\nb"',
        b"{}{}",
    ],
)
def test_decode_text_that_is_not_json_raises_invalid_json(text: bytes) -> None:
    """Text outside the grammar is rejected, and so are numbers outside the range of a double."""
    with pytest.raises(InvalidJSON):
        decode(text)
    with pytest.raises(InvalidJSON):
        decode_strict(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"NaN", "NaN is not JSON"),
        (b'["\\ud83d",-Infinity]', "-Infinity is not JSON"),
        (b"1e999", "a number beyond a double"),
        (b"[1,]", "Expecting value at character 3"),
    ],
)
def test_decode_failure_message_says_what_is_not_json(text: bytes, reason: str) -> None:
    """The reason reaches the sender, in a rejection or an answer."""
    with pytest.raises(InvalidJSON) as refused:
        decode(text)

    assert str(refused.value) == reason


def test_decode_lenient_keeps_finite_numbers_beside_others() -> None:
    """Only what is not finite becomes None."""
    assert decode_lenient(b"[1.5, NaN, -2e3]") == [1.5, None, -2000.0]


@pytest.mark.parametrize("text", [b'{"a": canary}', b'"canary', b'["\\ud83d", canary]', b"\xffcanary"])
def test_decode_failure_message_does_not_repeat_the_text(text: bytes) -> None:
    """Payloads are prompts and answers, which must not appear in messages."""
    with pytest.raises(InvalidJSON) as refused:
        decode(text)

    assert "canary" not in str(refused.value)


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":[', b"]}")])
def test_decode_nesting_is_limited_on_both_sides_of_the_limit(opening: bytes, closing: bytes) -> None:
    """A text at the limit is read, one level more is not; strict and tolerant decoding agree."""
    levels = MAX_DEPTH // opening.count(b"[") // (1 + opening.count(b"{"))
    fits = nested(levels, opening, closing)
    too_deep = b"[" + fits + b"]"

    assert encode(decode(fits)) == fits
    for text in (too_deep, b'["\\ud83d",' + fits + b"]"):
        with pytest.raises(InvalidJSON, match="nested too deeply"):
            decode(text)
        with pytest.raises(InvalidJSON):
            decode_strict(text)
    with pytest.raises(InvalidJSON, match=r"^nested too deeply$"):
        decode_strict(too_deep)


@pytest.mark.parametrize("prefix", [b"", b'"\\ud83d",'])
def test_decode_bottomless_nesting_raises_invalid_json(prefix: bytes) -> None:
    """A megabyte of brackets is rejected and does not crash the process."""
    with pytest.raises(InvalidJSON, match="nested too deeply"):
        decode(b"[" + prefix + nested(500_000) + b"]")


def test_decode_many_flat_brackets_is_not_deep() -> None:
    """A long list of lists is read."""
    assert decode(b"[" + b"[1]," * 1000 + b"{}]") == [[1]] * 1000 + [{}]


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        ("plain", "plain"),
        ("🐟", "🐟"),
        (HALF_FISH, "\ufffd"),
        (HALF_FISH + "\udc1f", "🐟"),
        (["a", HALF_FISH, 1], ["a", "\ufffd", 1]),
        ({HALF_FISH: {"x": [HALF_FISH]}}, {"\ufffd": {"x": ["\ufffd"]}}),
        (None, None),
        (1.5, 1.5),
    ],
)
def test_replace_surrogates_in_any_value_leaves_clean_unicode(value: Any, clean: Any) -> None:
    """Lone surrogates become U+FFFD, pairs are joined, the rest is unchanged."""
    assert replace_surrogates(value) == clean


def test_encode_value_with_lone_surrogate_writes_replacement() -> None:
    """Surrogates are replaced in values and in structs."""
    assert encode({"a": HALF_FISH}) == '{"a":"\ufffd"}'.encode()
    assert decode(encode(JobError(ErrorCode.TRUNCATED, HALF_FISH)))["message"] == "\ufffd"


def test_encode_is_compact_utf8() -> None:
    """No blanks and no unnecessary escapes."""
    assert encode({"a": ["ü🐟\u2028", 1, None]}) == '{"a":["ü🐟\u2028",1,null]}'.encode()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'{"a":"x\x1by\nz"}', {"a": "x\x1by\nz"}),
        (b"[NaN, Infinity, -Infinity, 1e999]", [None, None, None, None]),
        (b'"\\ud83d"', "\ud83d"),
        (b"[9007199254740993, 1e3]", [9007199254740993, 1000.0]),
    ],
)
def test_decode_lenient_reads_what_has_one_meaning(text: bytes, value: Any) -> None:
    """Control characters in strings, and numbers that are not finite; `decode` rejects both."""
    assert decode_lenient(text) == value


@pytest.mark.parametrize("text", [b"", b"{", b"{'a':1}", b"[1,]", b"undefined", b"[" * 200 + b"]" * 200])
def test_decode_lenient_of_other_text_raises_invalid_json(text: bytes) -> None:
    """It does not guess."""
    with pytest.raises(InvalidJSON):
        decode_lenient(text)


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (0, 0),
        (7, 7),
        (MAX_COUNT, MAX_COUNT),
        (MAX_COUNT + 1, None),
        (-1, None),
        (True, None),
        (1.0, None),
        ("1", None),
    ],
)
def test_as_count_believes_integers_in_a_range(value: Any, count: int | None) -> None:
    """Upstreams and clients may send any number."""
    assert as_count(value) == count
