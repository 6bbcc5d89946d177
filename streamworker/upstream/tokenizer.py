"""The tokenizer for estimates, if the extra `tokenizer` is installed. It works offline."""

from __future__ import annotations

import warnings

from streamworker.stream.usage import Tokenizer

__all__ = ["load_tokenizer"]

VOCABULARY = "o200k_base"
"""OpenAI's present vocabulary. Others differ by some per cent, so the estimate names the vocabulary."""


def load_tokenizer() -> Tokenizer | None:
    """Return the tokenizer, or None if the extra is not installed."""
    with warnings.catch_warnings():  # it reads its data with a function that Python 3.11 deprecates
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            import bpe_openai  # noqa: PLC0415 - an optional package of 70 MB
        except ImportError:
            return None
        encoding = bpe_openai.get_encoding(VOCABULARY)
    return Tokenizer(VOCABULARY, lambda text: len(encoding.encode_ordinary(text)))
