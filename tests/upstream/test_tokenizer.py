"""The tokenizer, if it is installed."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from streamworker.upstream.tokenizer import find_tokenizer

if TYPE_CHECKING:
    import pytest


def test_tokenizer_counts_as_openai_does() -> None:
    """Known counts of o200k_base; special tokens and lone surrogates are ordinary text."""
    tokenizer = find_tokenizer()
    assert tokenizer is not None
    assert tokenizer.name == "o200k_base"

    assert [tokenizer.count(text) for text in ("", "hello world", "antidisestablishmentarianism")] == [
        0,
        2,
        6,
    ]
    assert tokenizer.count("<|endoftext|>") > 1
    assert tokenizer.count("\ud83d broken") > 0
    # The library alone refuses a million characters; each of the 15 parts may count one token more.
    assert 0 <= tokenizer.count("word " * 300_000) - 300_001 <= 15


def test_tokenizer_that_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate counts bytes instead."""
    monkeypatch.setattr("streamworker.upstream.tokenizer.find_spec", lambda _: None)

    assert find_tokenizer() is None


def test_tokenizer_is_not_loaded_before_it_counts() -> None:
    """A worker that starts does not wait for it."""
    code = (
        "import sys; from streamworker.upstream.tokenizer import find_tokenizer; tokenizer = find_tokenizer()"
    )
    code += (
        "; assert 'bpe_openai' not in sys.modules; tokenizer.count(''); assert 'bpe_openai' in sys.modules"
    )

    subprocess.run([sys.executable, "-c", code], check=True)
