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

VOCABULARY = "o200k_base"
"""OpenAI's present vocabulary. Others differ by some per cent, so the estimate names the vocabulary."""


def find_tokenizer() -> Tokenizer | None:
    """Return the tokenizer, or None if the extra is not installed.

    It is loaded when it counts for the first time, which takes half a second of processor time.
    """
    if find_spec("bpe_openai") is None:
        return None
    return Tokenizer(VOCABULARY, lambda text: len(_encode()(text)))


@cache
def _encode() -> Callable[[str], Any]:
    with warnings.catch_warnings():  # it reads its data with a function that Python 3.11 deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        import bpe_openai  # noqa: PLC0415 - an optional package of 70 MB

        encode: Callable[[str], Any] = bpe_openai.get_encoding(VOCABULARY).encode_ordinary
    return encode
