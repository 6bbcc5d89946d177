"""Parsers of option values. Each raises ValueError with a text that names the valid values."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def count(low: int, high: int, bare: int | None = None) -> Callable[[str], int]:
    """Return a parser of numbers in a range; `bare` is the value of the option without a value."""

    def convert(text: str) -> int:
        if not text and bare is not None:
            return bare
        # int() also accepts "+5", "1_000" and digits of other alphabets.
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a number from {low} to {high}, not {text!r}")
        return int(text)

    return convert


def milliseconds(text: str) -> float:
    """Parse a duration; fractions are allowed."""
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text):
        raise ValueError(f"must be milliseconds, not {text!r}")
    return float(text)


def seconds(text: str) -> float:
    """Parse a time difference; a negative one is in the past."""
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise ValueError(f"must be seconds, not {text!r}")
    return float(text)


def one_of(*words: str) -> Callable[[str], str]:
    """Return a parser that accepts one of these words."""

    def convert(text: str) -> str:
        if text not in words:
            raise ValueError(f"must be one of {', '.join(words)}, not {text!r}")
        return text

    return convert


def flag(text: str) -> bool:
    """Parse an option that takes no value."""
    if text not in {"", "1", "true"}:
        raise ValueError(f"takes no value, not {text!r}")
    return True


def header_value(text: str) -> str:
    """Parse a value that can be sent in a header."""
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", text):
        raise ValueError("must be printable ASCII")
    return text
