"""Results to records: value, key and headers."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from streamworker.model import (
    ErrorCode,
    Headers,
    JobError,
    Observed,
    Result,
    Source,
    Status,
    Timing,
    TopicPartition,
    UsageSource,
)
from streamworker.wire.json import decode
from streamworker.wire.result import ResultWriter

TO = TopicPartition("results", 3)
TRACE: Headers = (("traceparent", b"00-1"),)
COMPLETION: dict[str, Any] = {"object": "chat.completion", "choices": [{"message": {"content": "🐟"}}]}
RESULT = Result(
    job_id="j",
    attempt="a",
    seq=2,
    ts=1_700_000_000_123,
    status=Status.INTERRUPTED,
    finish_reasons={},
    usage=None,
    usage_source=UsageSource.NONE,
    observed=Observed(),
    error=JobError(ErrorCode.TRUNCATED, "no end"),
    timing=Timing(None, None, 3),
    tries=1,
    metadata={"k": "v"},
    model="m",
    upstream="u",
    source=Source("jobs", 1, 2),
    events=None,
    completion=COMPLETION,
    omitted=[],
)
PLAIN: Headers = (
    ("content-type", b"application/json"),
    ("streamworker-type", b"result"),
    ("streamworker-status", b"interrupted"),
)
CLOUD: Headers = (
    ("ce_specversion", b"1.0"),
    ("ce_type", b"dev.streamworker.result.v1"),
    ("ce_source", b"/s"),
    ("ce_id", b"j/a/result"),
    ("ce_subject", b"j"),
    ("ce_time", b"2023-11-14T22:13:20.123Z"),
)


@pytest.mark.parametrize(("cloud_source", "headers"), [(None, PLAIN), ("/s", PLAIN + CLOUD)])
def test_result_record_is_keyed_by_its_job_and_has_its_status_as_a_header(
    cloud_source: str | None, headers: Headers
) -> None:
    """Readers can filter without parsing; the trace context comes last; the value is the same in both formats."""
    record = ResultWriter(cloud_source=cloud_source).write(RESULT, TO, TRACE)

    assert (record.topic_partition, record.key) == (TO, b"j")
    assert record.headers == headers + TRACE
    assert decode(record.value or b"") == msgspec.to_builtins(RESULT)


@pytest.mark.parametrize("completion", [COMPLETION, None])
def test_result_with_half_a_character_is_written_with_a_replacement(
    completion: dict[str, Any] | None,
) -> None:
    """A lone surrogate of an upstream's message stops no result; the completion and the other members are the same."""
    error = JobError(ErrorCode.TRUNCATED, "no \ud83d end")
    broken = msgspec.structs.replace(RESULT, error=error, completion=completion)
    repaired = msgspec.structs.replace(
        broken, error=JobError(ErrorCode.TRUNCATED, "no \ufffd end"), completion=completion
    )
    record = ResultWriter().write(broken, TO)

    assert decode(record.value or b"") == msgspec.to_builtins(repaired)
