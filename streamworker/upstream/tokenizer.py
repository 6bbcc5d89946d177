"""A real tokenizer for estimates, where one is installed: the extra `tokenizer`. It works offline."""

from __future__ import annotations

import warnings

from streamworker.stream.usage import Tokenizer

__all__ = ["load_tokenizer"]

VOCABULARY = "o200k_base"
"""OpenAI's present vocabulary. Others differ by some per cent, which is why the estimate names it."""


def load_tokenizer() -> Tokenizer | None:
    """Return the tokenizer, None where the extra is not installed."""
    with warnings.catch_warnings():  # it reads its data by a function that Python 3.11 deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            import bpe_openai  # noqa: PLC0415 - 70 MB that most do not have
        except ImportError:
            return None
        encoding = bpe_openai.get_encoding(VOCABULARY)
    return Tokenizer(VOCABULARY, lambda text: len(encoding.encode_ordinary(text)))
