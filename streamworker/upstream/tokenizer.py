"""The tokenizer for estimates, if the extra `tokenizer` is installed. It works offline."""

from __future__ import annotations

import warnings
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from streamworker.stream.usage import Tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["find_tokenizer"]

_MAX_CHARS = 100_000
"""Characters that are encoded at once. The library refuses a million; a cut adds at most one token."""

VOCABULARY = "o200k_base"
"""OpenAI's present vocabulary. Others differ by some per cent, so the estimate names the vocabulary."""


def find_tokenizer() -> Tokenizer | None:
    """Return the tokenizer, or None if the extra is not installed.

    It is loaded when it counts for the first time, which takes half a second of processor time.
    """
    if find_spec("bpe_openai") is None:
        return None
    return Tokenizer(VOCABULARY, _count)


def _count(text: str) -> int:
    encode = _encode()
    return sum(
        len(encode(text[start : start + _MAX_CHARS])) for start in range(0, max(len(text), 1), _MAX_CHARS)
    )


@cache
def _encode() -> Callable[[str], Any]:
    with warnings.catch_warnings():  # it reads its data with a function that Python 3.11 deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        import bpe_openai  # noqa: PLC0415 - an optional package of 70 MB

        encode: Callable[[str], Any] = bpe_openai.get_encoding(VOCABULARY).encode_ordinary
    return encode
