"""The identity of a line: a digest of its content, and the ids of the jobs that are made of it.

A line's identity does not depend on its position, so a file may grow or be sorted between two runs. The job of a line
in the k-th round of `--retry-failed` is `<prefix><digest>.<k>`, and `<prefix><digest>` in the first run.
"""

from __future__ import annotations

import re
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec

from streamworker.wire.json import replace_surrogates

__all__ = [
    "MAX_ROUND",
    "RUN_PATTERN",
    "JobIds",
    "JobRef",
    "digest_of",
    "digest_of_output",
    "faulty_digest",
    "output_id",
]

RUN_PATTERN = r"[A-Za-z0-9._-]{1,64}"
"""A run's name."""

MAX_ROUND = 250
"""Rounds that a run can have: the index keeps a byte for each line's."""

_DIGEST_BYTES = 16
_CANONICAL = msgspec.json.Encoder(order="sorted")
_OUTPUT_ID = re.compile(r"batch_req_sw([0-9a-f]{32})\Z")
_REST = re.compile(rb"([0-9a-f]{32})(?:\.([1-9]\d{0,2}))?\Z")


class JobRef(NamedTuple):
    """What a job id of a run names: a line, and the round in which it was submitted."""

    digest: bytes
    round: int


def digest_of(custom_id: str, body: Any) -> bytes:
    """Return the first 16 bytes of SHA-256 over custom_id, NUL, and the body as canonical JSON."""
    try:
        text = _CANONICAL.encode(body)
    except UnicodeEncodeError:
        text = _CANONICAL.encode(replace_surrogates(body))
    name = custom_id.encode("utf-8", "replace")
    return sha256(name + b"\0" + text).digest()[:_DIGEST_BYTES]


def faulty_digest(text: bytes, occurrence: int) -> bytes:
    """Return the digest of a faulty line. `occurrence` counts earlier equal lines of the file."""
    return sha256(b"\0faulty %d\0" % occurrence + text).digest()[:_DIGEST_BYTES]


def output_id(digest: bytes) -> str:
    """Return the `id` of the line's output."""
    return f"batch_req_sw{digest.hex()}"


def digest_of_output(line_id: Any) -> bytes | None:
    """Return the digest in the `id` of an output line; None if another program wrote the line."""
    found = _OUTPUT_ID.match(line_id) if isinstance(line_id, str) else None
    return bytes.fromhex(found[1]) if found else None


class JobIds:
    """The job ids of one run. `prefix` ends with a dot, as in `b.nightly.`."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._prefix = prefix.encode()

    def job_id(self, digest: bytes, round_: int) -> str:
        """Return the id of a line's job."""
        return f"{self.prefix}{digest.hex()}.{round_}" if round_ else f"{self.prefix}{digest.hex()}"

    def read(self, key: bytes | None) -> JobRef | None:
        """Return what a record's key names; None for the key of another run or program."""
        if key is None or not key.startswith(self._prefix):
            return None
        if (found := _REST.match(key, len(self._prefix))) is None:
            return None
        round_ = int(found[2] or 0)
        return JobRef(bytes.fromhex(found[1].decode()), round_) if round_ <= MAX_ROUND else None
