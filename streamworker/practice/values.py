"""Readers of option values: text in, the value out, or a ValueError that says what was wanted."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def count(low: int, high: int, bare: int | None = None) -> Callable[[str], int]:
    """A number in a range; `bare` is what the option means without a value."""

    def convert(text: str) -> int:
        if not text and bare is not None:
            return bare
        # int() takes "+5", "1_000" and other alphabets' digits, none of which anyone means here.
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a number from {low} to {high}, not {text!r}")
        return int(text)

    return convert


def milliseconds(text: str) -> float:
    """A length of time, fractions allowed."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text):
        raise ValueError(f"must be milliseconds, not {text!r}")
    return float(text)


def seconds(text: str) -> float:
    """A distance in time, to the past if negative."""
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise ValueError(f"must be seconds, not {text!r}")
    return float(text)


def one_of(*words: str) -> Callable[[str], str]:
    """One of these words."""

    def convert(text: str) -> str:
        if text not in words:
            raise ValueError(f"must be one of {', '.join(words)}, not {text!r}")
        return text

    return convert


def flag(text: str) -> bool:
    """An option that stands alone."""
    if text not in {"", "1", "true"}:
        raise ValueError(f"takes no value, not {text!r}")
    return True


def header_value(text: str) -> str:
    """What can stand in a header."""
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", text):
        raise ValueError("must be printable ASCII")
    return text
