"""Events of a job as one completion."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.chat import ChatCompletion as OpenAICompletion

from tests.chats import JOB, NOW, completion, delta, ended, failed, started, text


def made(*records: bytes, **options: Any) -> dict[str, Any]:
    """Return the completion, which there has to be."""
    whole = completion(records, **options)
    assert whole.is_over
    assert whole.failure is None
    body: dict[str, Any] = json.loads(whole.body)
    return body


def test_completion_is_made_of_the_deltas_and_the_usage_of_the_terminal_event() -> None:
    """`id` is named after the job, as in a stream."""
    assert made(started(), text("Ciao"), text("!"), ended()) == {
        "id": f"chatcmpl-{JOB}",
        "object": "chat.completion",
        "created": NOW // 1000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Ciao!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 15, "completion_tokens": 2},
        "streamworker": {"job_id": JOB, "usage_source": "upstream", "status": "completed"},
    }


def test_completion_keeps_the_members_of_its_upstream() -> None:
    """Id, creation time, model and unknown members."""
    head = {"id": "c", "created": 7, "model": "n", "system_fingerprint": "fp"}
    whole = made(started(), text("a", chunk=head, extra={"x_groq": 1, "matched_stop": 2}), ended())

    assert {name: whole[name] for name in head} == head
    assert whole["x_groq"] == 1
    assert whole["choices"][0]["matched_stop"] == 2


def test_completion_has_every_choice_and_tool_call() -> None:
    """In the order of the indices."""
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    whole = made(
        started(),
        delta({"tool_calls": [call]}, choice=1),
        text("a"),
        ended(finish_reasons={"0": "stop", "1": "tool_calls"}),
    )

    assert [choice["finish_reason"] for choice in whole["choices"]] == ["stop", "tool_calls"]
    assert whole["choices"][1]["message"]["tool_calls"][0]["function"]["name"] == "f"
    OpenAICompletion.model_validate(whole | {"usage": None})


@pytest.mark.parametrize("source", ["estimated", "none", "upstream_partial"])
def test_usage_is_the_terminal_events_whatever_its_source(source: str) -> None:
    """The `streamworker` member says where it comes from."""
    usage = None if source == "none" else {"completion_tokens": 3}
    whole = made(started(), text("a"), ended(usage=usage, usage_source=source))

    assert whole["usage"] == usage
    assert whole["streamworker"]["usage_source"] == source


def test_new_attempt_replaces_the_one_before_it() -> None:
    """Nothing of it was sent."""
    whole = made(started("a"), text("void"), started("b", model="n"), text("valid"), ended())

    assert whole["choices"][0]["message"]["content"] == "valid"
    assert (whole["id"], whole["model"]) == (f"chatcmpl-{JOB}", "n")


def test_job_that_did_not_complete_has_a_failure_and_no_body() -> None:
    """Whatever was generated of it."""
    whole = completion([started(), text("a"), failed("truncated", "interrupted")])

    assert whole.is_over
    assert whole.body == b""
    assert whole.failure is not None
    assert (whole.failure.status, whole.failure.code) == (502, "truncated")


def test_completion_above_the_limit_is_refused() -> None:
    """The message says how to get it."""
    whole = completion([started(), *[text("x" * 100)] * 20, ended()], limit_bytes=1000)

    assert whole.body == b""
    assert whole.failure is not None
    assert (whole.failure.status, whole.failure.code, whole.failure.retriable) == (502, "too_large", False)
    assert "stream: true" in whole.failure.message


def test_log_probabilities_are_left_out_before_the_text() -> None:
    """The `streamworker` member names what is missing."""
    record = text("x", logprobs={"content": [{"token": "x" * 100}]})
    whole = made(started(), *[record] * 20, ended(), limit_bytes=1000)

    assert whole["choices"][0]["message"]["content"] == "x" * 20
    assert whole["choices"][0]["logprobs"] is None
    assert whole["streamworker"]["omitted"] == ["logprobs"]


def test_completion_without_any_delta_has_no_choices() -> None:
    """A completed job whose upstream opened no choice."""
    whole = completion([started(), ended(finish_reasons={}, usage=None, usage_source="none")])

    assert whole.failure is None
    assert json.loads(whole.body)["choices"] == []
