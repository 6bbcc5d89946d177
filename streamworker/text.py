"""Size limits for text that an upstream or a user wrote and that appears in an event, a header or a log."""

from __future__ import annotations

__all__ = ["BYTES_PER_TOKEN", "RAW_TEXT_LIMIT", "UPSTREAM_TEXT_LIMIT", "truncate"]

BYTES_PER_TOKEN = 4
"""Bytes of UTF-8 per token, typical for byte-pair vocabularies on mixed text; for estimates only."""

UPSTREAM_TEXT_LIMIT = 2048
"""Bytes of an upstream's body or frame in a terminal event."""

RAW_TEXT_LIMIT = 2 * UPSTREAM_TEXT_LIMIT
"""Bytes kept until secrets are removed. A secret that crosses the final cut would otherwise leave its beginning."""


def truncate(text: str, limit: int = RAW_TEXT_LIMIT) -> str:
    """Shorten the text to at most `limit` bytes of UTF-8 without splitting a character."""
    data = text.encode("utf-8", "replace")
    return text if len(data) <= limit else data[:limit].decode("utf-8", "ignore")
