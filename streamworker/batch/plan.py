"""What the lines of earlier output files mean for the lines of the input."""

from __future__ import annotations

from enum import Enum, auto
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from streamworker.batch.identity import digest_of_output

if TYPE_CHECKING:
    from streamworker.batch.index import LineIndex

__all__ = ["NotABatchLine", "PriorLine", "Verdict", "judge", "read_prior"]


_OF_THE_BATCH = frozenset({"batch_expired", "batch_cancelled"})
"""Codes of requests that were not refused: the same request may succeed later."""

_RETRIABLE = frozenset({408, 409, 429, 500, 502, 503, 504})
"""HTTP statuses in the files of other programs, which do not say whether a request may succeed later."""


class NotABatchLine(ValueError):
    """A line that is not an output or error line of a batch."""


class _Body(msgspec.Struct):
    usage: Any = None


class _Response(msgspec.Struct):
    status_code: int | None = None
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Line(msgspec.Struct):
    id: Any
    custom_id: str | None
    response: _Response | None = None
    error: Any = None
    usage: Any = None
    usage_source: str | None = None
    line: int | None = None


_DECODER = msgspec.json.Decoder(_Line)
_BODY = msgspec.json.Decoder(_Body)


class PriorLine(NamedTuple):
    """A line of an output file.

    `code` and `retriable` are those of its error. `usage` and `usage_source` are for the accounts.
    """

    digest: bytes | None
    custom_id: str | None
    is_error: bool
    code: str
    retriable: bool
    usage: Any
    usage_source: str


class Verdict(Enum):
    """What a line of an output file is for the input."""

    DONE = auto()
    """The line's output, or the output of another program for its custom id."""
    CHANGED = auto()
    """Output for the line's custom id and another body."""
    ABSENT = auto()
    """Output for a line that the input does not have."""


def read_prior(text: bytes) -> PriorLine:
    """Read a line of an output file. Raises NotABatchLine."""
    try:
        line = _DECODER.decode(text)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise NotABatchLine from None
    status = line.response.status_code if line.response is not None else None
    is_error = line.error is not None or status is None or not 200 <= status < 300
    error = line.error if type(line.error) is dict else {}
    usage = line.usage if is_error else _usage_of(line.response)
    source = line.usage_source or ("none" if usage is None else "upstream")
    if not is_error and usage is None:
        source = "unknown"  # a completion has no usage where it was estimated or is unknown
    code = str(error.get("code") or "unknown")
    return PriorLine(
        digest_of_output(line.id),
        line.custom_id,
        is_error,
        code,
        bool(error.get("retriable")) or code in _OF_THE_BATCH or status in _RETRIABLE,
        usage,
        source,
    )


def _usage_of(response: _Response | None) -> Any:
    try:
        return _BODY.decode(response.body).usage if response is not None else None
    except (msgspec.MsgspecError, RecursionError):
        return None


def judge(prior: PriorLine, index: LineIndex) -> tuple[Verdict, int]:
    """Return what a line of an output file is, and the line of the input that it belongs to; -1 for none.

    A digest identifies the line's content. A line of another program has none, and belongs to the line of its custom id.
    """
    if prior.digest is not None and (line := index.find(prior.digest)) is not None:
        return Verdict.DONE, line
    if prior.custom_id is not None:
        for line in index.named(prior.custom_id):
            return (Verdict.DONE if prior.digest is None else Verdict.CHANGED), line
    return Verdict.ABSENT, -1
