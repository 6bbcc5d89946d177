"""Result records: the whole result of a job, for readers that need no deltas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from streamworker.model import ProducerRecord
from streamworker.wire.event import cloud_headers, plain_headers, rfc3339
from streamworker.wire.json import encode, replace_surrogates

if TYPE_CHECKING:
    from streamworker.model import Headers, Result, TopicPartition

__all__ = ["ResultWriter"]

_ENCODER = msgspec.json.Encoder()


class ResultWriter:
    """Writes results as records, in plain JSON or as CloudEvents 1.0 (Kafka binding, binary mode)."""

    def __init__(self, *, cloud_source: str | None = None) -> None:
        """Create a writer. It writes CloudEvents if `cloud_source`, the `ce_source` header, is given."""
        self._headers: Headers = plain_headers("result")
        self._cloud_headers: Headers = () if cloud_source is None else cloud_headers("result", cloud_source)

    def write(self, result: Result, to: TopicPartition, trace: Headers = ()) -> ProducerRecord:
        """Return the result's record. Its key is the job id."""
        headers = (*self._headers, ("streamworker-status", result.status.value.encode()))
        if self._cloud_headers:
            headers += self._cloud_headers
            headers += (
                ("ce_id", f"{result.job_id}/{result.attempt}/result".encode()),
                ("ce_subject", result.job_id.encode()),
                ("ce_time", rfc3339(result.ts).encode()),
            )
        return ProducerRecord(to, result.job_id.encode(), _encoded(result), headers + trace)


def _encoded(result: Result) -> bytes:
    try:
        return _ENCODER.encode(result)
    except UnicodeEncodeError:  # never in the completion, whose texts the assembler has cleaned
        members = replace_surrogates(msgspec.to_builtins(msgspec.structs.replace(result, completion=None)))
        return encode(members | {"completion": result.completion})
