"""The lines of the output files."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from streamworker.batch.lines import Fault, FaultCode
from streamworker.batch.output import (
    EndedJob,
    error_line,
    fault_line,
    is_completed,
    local_error_line,
    output_line,
    read_result,
)

DIGEST = bytes(16)
ID = "batch_req_sw" + 32 * "0"


def ended(status: str = "failed", completion: Any = None, **members: Any) -> EndedJob:
    return EndedJob(
        job_id="b.r.x",
        attempt="a1",
        status=status,
        usage_source=members.pop("usage_source", "none"),
        completion=msgspec.Raw(json.dumps(completion, ensure_ascii=False).encode()),
        **members,
    )


def error(**members: Any) -> dict[str, Any]:
    return {
        "code": "upstream_rejected",
        "message": "no",
        "http_status": None,
        "upstream": None,
        "retriable": False,
    } | members


def line_of(job: EndedJob) -> dict[str, Any]:
    text, _ = error_line(DIGEST, "c", job)
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def test_output_line_is_openai_s_and_nothing_besides() -> None:
    """Four members; the completion is the body, byte for byte."""
    text = output_line(DIGEST, 'c"\n', ended("completed", {"choices": [], "x": 1.0}))

    assert json.loads(text) == {
        "id": ID,
        "custom_id": 'c"\n',
        "response": {"status_code": 200, "request_id": "a1", "body": {"choices": [], "x": 1.0}},
        "error": None,
    }
    assert text.count(b"\n") == 1


def test_output_lines_escape_the_line_ends_of_other_readers() -> None:
    """`splitlines` sees one line; the text is the same."""
    content = "a\u0085b\u2028c\u2029dÂ\u00c2\u0080â"
    text = output_line(DIGEST, content, ended("completed", {"content": content}))

    assert len(text.decode().splitlines()) == 1
    line = json.loads(text)
    assert line["custom_id"] == line["response"]["body"]["content"] == content


@pytest.mark.parametrize(
    ("status", "completion", "expected"),
    [
        ("completed", {"choices": []}, True),
        ("completed", None, False),
        ("interrupted", {"choices": []}, False),
    ],
)
def test_completed_job_needs_a_completion(status: str, completion: Any, expected: bool) -> None:
    """A completed job without its completion is not an output line."""
    assert is_completed(ended(status, completion)) is expected


def test_error_line_of_a_transport_failure_has_no_response() -> None:
    """`response` is null; what is known of the usage is kept."""
    line = line_of(ended(error=error(code="timeout_idle", message="slow", retriable=True)))

    assert line == {
        "id": ID,
        "custom_id": "c",
        "response": None,
        "error": {"code": "timeout_idle", "message": "slow", "retriable": True},
        "usage_source": "none",
    }


@pytest.mark.parametrize(
    ("upstream", "expected"),
    [
        (
            '{"error":{"message":"own","type":"t","param":"p","code":"c"}}',
            {"message": "own", "type": "t", "param": "p", "code": "c"},
        ),
        (
            '{"error":{"message":"own"}}',
            {"message": "own", "type": "upstream_rejected", "param": None, "code": None},
        ),
        ('{"error":"text"}', {"message": "no", "type": "upstream_rejected", "param": None, "code": None}),
        (
            '{"error":{"message":"cut',
            {"message": "no", "type": "upstream_rejected", "param": None, "code": None},
        ),
        ("[]", {"message": "no", "type": "upstream_rejected", "param": None, "code": None}),
        (None, {"message": "no", "type": "upstream_rejected", "param": None, "code": None}),
    ],
)
def test_error_line_of_an_http_error_has_the_upstream_s_error(
    upstream: str | None, expected: dict[str, Any]
) -> None:
    """`response` and `error` are both there: clients read one or the other."""
    line = line_of(ended(error=error(http_status=429, upstream=upstream)))

    assert line["response"] == {"status_code": 429, "request_id": "a1", "body": {"error": expected}}
    assert line["error"] == {"code": "upstream_rejected", "message": "no", "retriable": False}


@pytest.mark.parametrize("status", [None, 200, 399, "429", True])
def test_error_line_has_a_response_only_for_http_errors(status: Any) -> None:
    """An error within a stream of status 200 is not an HTTP error."""
    assert line_of(ended(error=error(http_status=status)))["response"] is None


@pytest.mark.parametrize(
    ("status", "given", "code", "words"),
    [
        ("expired", error(code="deadline", message="late"), "batch_expired", "completion window expired"),
        ("cancelled", error(code="cancelled", message="enough"), "batch_cancelled", "enough"),
        ("cancelled", error(code="cancelled", message=""), "batch_cancelled", "cancelled"),
        ("completed", None, "completion_omitted", "max_result_bytes"),
        ("rejected", error(code="invalid_job", message="bad"), "invalid_job", "bad"),
        ("interrupted", None, "interrupted", "interrupted"),
        ("failed", error(message=""), "upstream_rejected", "upstream_rejected"),
    ],
)
def test_error_line_names_the_end_of_a_batch(status: str, given: Any, code: str, words: str) -> None:
    """Expired and cancelled jobs have OpenAI's codes; no code or message is empty."""
    line = line_of(ended(status, error=given))

    assert line["error"]["code"] == code
    assert words in line["error"]["message"]


def test_error_line_keeps_text_and_usage_that_were_paid_for() -> None:
    """`partial` is the completion as far as it came."""
    usage = {"prompt_tokens": 3}
    job = ended("interrupted", {"choices": [1]}, error=error(), usage=usage, usage_source="upstream_partial")
    line = line_of(job)

    assert (line["partial"], line["usage"], line["usage_source"]) == (
        {"choices": [1]},
        usage,
        "upstream_partial",
    )


def test_fault_line_has_the_line_number_if_there_is_no_custom_id() -> None:
    """A faulty line with a custom id is found by it."""
    named = json.loads(fault_line(DIGEST, Fault(FaultCode.INVALID_URL, "why", "c"), 7))
    unnamed = json.loads(fault_line(DIGEST, Fault(FaultCode.INVALID_JSON_LINE, "why"), 7))

    assert (named["custom_id"], "line" in named) == ("c", False)
    assert (unnamed["custom_id"], unnamed["line"], unnamed["response"]) == (None, 7, None)
    assert unnamed["error"] == {"code": "invalid_json_line", "message": "why", "retriable": False}


def test_local_error_line_has_a_code_and_a_message() -> None:
    """For a line that has no job."""
    line = json.loads(local_error_line(DIGEST, "c", "batch_expired", "late", retriable=True))

    assert line == {
        "id": ID,
        "custom_id": "c",
        "response": None,
        "error": {"code": "batch_expired", "message": "late", "retriable": True},
    }


def test_result_record_is_read() -> None:
    """Unknown members are ignored; the completion stays encoded."""
    record = {
        "job_id": "j", "attempt": "a", "status": "completed", "usage_source": "upstream", "usage": {"a": 1},
        "error": None, "metadata": {"custom_id": "c"}, "completion": {"x": [1]}, "omitted": ["logprobs"],
        "events": {"topic": "t", "partition": 1, "offset": 2}, "later": 1,
    }  # fmt: skip
    job = read_result(json.dumps(record).encode())

    assert (job.job_id, job.metadata, json.loads(bytes(job.completion)), job.omitted) == (
        "j",
        {"custom_id": "c"},
        {"x": [1]},
        ["logprobs"],
    )
    assert job.events is not None
    assert (job.events.topic, job.events.partition, job.events.offset) == ("t", 1, 2)


@pytest.mark.parametrize("value", [b"", b"[]", b"{}", b'{"job_id":1}', b"\xff", b"[" * 5000])
def test_value_that_is_not_a_result_is_refused(value: bytes) -> None:
    """By ValueError, whatever it holds."""
    with pytest.raises(ValueError):
        read_result(value)
