"""Bounds on text that an upstream or a user wrote and that an event, a header or a log carries on."""

from __future__ import annotations

__all__ = ["RAW_TEXT_LIMIT", "UPSTREAM_TEXT_LIMIT", "truncate"]

UPSTREAM_TEXT_LIMIT = 2048
"""Bytes of an upstream's body or frame that a terminal event carries."""

RAW_TEXT_LIMIT = 2 * UPSTREAM_TEXT_LIMIT
"""Bytes kept until secrets are removed: a secret that lies across the final cut would leave its beginning."""


def truncate(text: str, limit: int = RAW_TEXT_LIMIT) -> str:
    """Shorten to at most `limit` bytes of UTF-8, never inside a character."""
    data = text.encode("utf-8", "replace")
    return text if len(data) <= limit else data[:limit].decode("utf-8", "ignore")
