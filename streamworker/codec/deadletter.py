"""Dead letters: the record as it was, with headers that say why it is here (contract §1)."""

from __future__ import annotations

from streamworker.core.faults import UPSTREAM_TEXT_LIMIT, cut
from streamworker.model import ErrorCode, Headers, Outgoing, Partition, Record

__all__ = ["PREFIX", "dead_letter"]

PREFIX = "__streamworker.errors."


def dead_letter(record: Record, to: Partition, *, code: ErrorCode, message: str, group: str) -> Outgoing:
    """Return the record's dead letter: key, value and headers byte for byte, ours added behind them."""
    topic, partition, offset = record.at
    told = {
        "code": code,
        "message": cut(message, UPSTREAM_TEXT_LIMIT),
        "topic": topic,
        "partition": partition,
        "offset": offset,
        "timestamp": record.timestamp,
        "group": group,
    }
    headers: Headers = tuple((PREFIX + name, str(value).encode()) for name, value in told.items())
    return Outgoing(to, record.key, record.value, record.headers + headers)
