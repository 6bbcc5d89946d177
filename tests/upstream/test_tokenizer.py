"""The tokenizer, if it is installed."""

from __future__ import annotations

import builtins
from typing import TYPE_CHECKING, Any

from streamworker.upstream.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import pytest


def test_tokenizer_counts_as_openai_does() -> None:
    """Known counts of o200k_base; special tokens and lone surrogates are ordinary text."""
    tokenizer = load_tokenizer()
    assert tokenizer is not None
    assert tokenizer.name == "o200k_base"

    assert [tokenizer.count(text) for text in ("", "hello world", "antidisestablishmentarianism")] == [
        0,
        2,
        6,
    ]
    assert tokenizer.count("<|endoftext|>") > 1
    assert tokenizer.count("\ud83d broken") > 0


def test_tokenizer_that_is_not_installed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The estimate counts bytes instead."""
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "bpe_openai":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    assert load_tokenizer() is None
