"""Each shape has the peculiarities of its provider."""

import asyncio
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from streamworker.practice import PracticeUpstream, expected_text, expected_tool_calls, expected_usage, tools
from streamworker.practice.shapes import CALLS, SHAPES
from tests.unit.practice.practice_client import MESSAGES, answer, ended

Chunks = list[dict[str, Any]]
OWN = {"include_usage": True}


async def said(practice: PracticeUpstream, model: str) -> Chunks:
    """Return the chunks of a stream without keep-alives and [DONE]."""
    body = b"".join(await answer(practice, model, stream_options=OWN))
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: {")]
    return [orjson.loads(line) for line in lines]


def first(chunks: Chunks) -> Any:
    """Return the first choice of the chunks."""
    return next(choice for chunk in chunks for choice in chunk["choices"])


def deltas(chunks: Chunks) -> list[Any]:
    return [choice["delta"] for chunk in chunks for choice in chunk["choices"] if "delta" in choice]


def finishes(chunks: Chunks) -> list[str]:
    found = [choice.get("finish_reason") for chunk in chunks for choice in chunk["choices"]]
    return [reason for reason in found if reason]


FACTS: dict[str, Callable[[Chunks], bool]] = {
    "seed": lambda all_: "created" not in all_[0] and "total_tokens" not in all_[-1]["usage"],
    "openai": lambda all_: (
        {chunk["usage"] is None for chunk in all_[:-2]} == {True} and "obfuscation" in all_[0]
    ),
    "azure": lambda all_: (
        all_[0]["choices"] == [] == [all_[0]["id"]][1:] and "delta" not in all_[-1]["choices"][0]
    ),
    "vllm": lambda all_: "stop_reason" in all_[-2]["choices"][0] and "usage" not in all_[0],
    "sglang": lambda all_: (
        deltas(all_)[1]["tool_calls"] is None and all_[-2]["choices"][0]["matched_stop"] == 2
    ),
    "llamacpp": lambda all_: first(all_)["delta"]["content"] is None and "timings" in all_[-2],
    "ollama": lambda all_: (
        all_[0]["system_fingerprint"] == "fp_ollama" and deltas(all_)[3]["role"] == "assistant"
    ),
    "tgi": lambda all_: {chunk["id"] for chunk in all_} == {""} and finishes(all_) == ["stop"],
    "groq": lambda all_: all_[-1]["x_groq"]["usage"] == all_[-1]["usage"] and all_[0]["id"] != all_[1]["id"],
    "deepseek": lambda all_: first(all_)["delta"]["content"] is None and all_[0]["usage"] is None,
    "qwen": lambda all_: "finish_reason" not in first(all_) and all_[0]["id"] == "",
    "kimi": lambda all_: (
        "object" not in all_[0] and "usage" in all_[-1]["choices"][0] and "usage" not in all_[-1]
    ),
    "openrouter": lambda all_: (
        len(finishes(all_)) == 2 and "cost" in all_[-1]["usage"] and "provider" in all_[0]
    ),
    "mistral": lambda all_: any(type(delta.get("content")) is list for delta in deltas(all_)),
    "together": lambda all_: all_[-8]["choices"][0]["text"] == deltas(all_)[-8]["content"],
    "fireworks": lambda all_: "perf_metrics" in all_[-1] and "usage" in all_[-1],
    "cerebras": lambda all_: "content" not in first(all_)["delta"] and "time_info" in all_[-1],
    "xai": lambda all_: (
        all_[-1]["usage"]["total_tokens"]
        > sum(all_[-1]["usage"][name] for name in ("prompt_tokens", "completion_tokens"))
    ),
    "perplexity": lambda all_: (
        all_[-1]["object"] == "chat.completion.done" and all("usage" in chunk for chunk in all_)
    ),
    "gemini": lambda all_: all("index" not in choice for chunk in all_ for choice in chunk["choices"]),
    "anthropic": lambda all_: all_[0]["system_fingerprint"] is None and all_[0]["created"] == 0,
    "litellm": lambda all_: any({"reasoning", "reasoning_content"} <= set(delta) for delta in deltas(all_)),
}


def test_every_shape_has_an_expectation() -> None:
    assert set(FACTS) == set(SHAPES)


@pytest.mark.parametrize("shape", SHAPES)
async def test_shape_has_the_chunks_of_its_provider(practice: PracticeUpstream, shape: str) -> None:
    model = f"p?shape={shape}&deltas=4&reasoning=2&tool_calls=1"
    chunks = await said(practice, model)

    assert FACTS[shape](chunks), chunks
    assert (await ended(practice)).usage_sent == expected_usage(model, MESSAGES)


@pytest.mark.parametrize("shape", SHAPES)
async def test_shape_does_not_change_the_content(practice: PracticeUpstream, shape: str) -> None:
    model = f"p?shape={shape}&deltas=5&choices=2"
    texts = ["", ""]
    for chunk in await said(practice, model):
        for choice in chunk["choices"]:
            content = choice.get("delta", {}).get("content") or ""
            texts[choice.get("index", 0)] += content if isinstance(content, str) else content[0]["text"]

    assert texts == expected_text(model, MESSAGES)


CALL = expected_tool_calls("p?tool_calls")[0]
FRAGMENTS: dict[str, Callable[[list[Any]], bool]] = {
    "fragments": lambda all_: all_[0]["function"]["arguments"] == "" and "id" not in all_[1],
    "interleaved": lambda all_: all_[0]["function"]["arguments"] == "" and "id" not in all_[1],
    "no_name": lambda all_: all("name" not in one["function"] for one in all_),
    "whole": lambda all_: all_ == [{"index": 0, **CALL}],
    "no_index": lambda all_: all("index" not in one and one["id"] == CALL["id"] for one in all_),
    "zero_index": lambda all_: {one["index"] for one in all_} == {0},
    "no_type": lambda all_: all("type" not in one for one in all_),
    "empty_id": lambda all_: [one["id"] for one in all_] == [CALL["id"], "", "", ""],
    "repeated": lambda all_: (
        {(one["id"], one["function"]["name"]) for one in all_} == {(CALL["id"], "look_up")}
    ),
    "late_name": lambda all_: [one["function"].get("name") for one in all_] == ["", None, None, "look_up"],
    "no_arguments": lambda all_: (
        "arguments" not in all_[0]["function"] and all_[-1]["function"] == {"arguments": ""}
    ),
    "sparse": lambda all_: {one["index"] for one in all_} == {3},
    "custom": lambda all_: all_[0]["custom"]["name"] == "look_up" and "function" not in all_[0],
    "function_call": lambda all_: all_[0] == {"name": "look_up", "arguments": ""},
}


@pytest.mark.parametrize("how", CALLS)
async def test_calls_as_selects_the_fragments(practice: PracticeUpstream, how: str) -> None:
    chunks = await said(practice, f"p?deltas=0&tool_calls&calls_as={how}")
    spoken = deltas(chunks)[1:]
    fragments = [
        delta["function_call"] if how == "function_call" else delta["tool_calls"][0] for delta in spoken
    ]
    parts = [one.get("function") or one.get("custom") or one for one in fragments]

    assert FRAGMENTS[how](fragments), fragments
    said_so = "".join(part.get("arguments") or part.get("input") or "" for part in parts)
    assert said_so == CALL["function"]["arguments"]


async def test_calls_as_interleaved_has_a_fragment_of_every_call_in_each_delta(
    practice: PracticeUpstream,
) -> None:
    chunks = await said(practice, "p?deltas=0&tool_calls=3&calls_as=interleaved")
    spoken = deltas(chunks)[1:]

    assert [[call["index"] for call in delta["tool_calls"]] for delta in spoken] == [[0, 1, 2]] * 4


@pytest.mark.parametrize("how", CALLS)
def test_count_of_calls_is_the_number_of_their_deltas(how: str) -> None:
    assert [tools.count(how, calls) for calls in (0, 1, 3)] == [
        len(list(tools.deltas(how, 0, calls))) for calls in (0, 1, 3)
    ]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("finish", lambda chunk: chunk["usage"]),
        ("own", lambda chunk: chunk["usage"] if chunk["choices"] == [] else None),
        ("choice", lambda chunk: chunk["choices"][-1]["usage"]),
        ("x_groq", lambda chunk: chunk["x_groq"]["usage"]),
        ("again", lambda chunk: chunk["usage"] if chunk["choices"][0]["finish_reason"] else None),
    ],
)
async def test_usage_option_selects_the_place_of_usage(
    practice: PracticeUpstream, where: str, found: Callable[[Any], Any]
) -> None:
    model = f"p?deltas=3&usage={where}"
    chunks = await said(practice, model)

    assert found(chunks[-1]) == expected_usage(model, MESSAGES)
    assert orjson.dumps(chunks).count(b'"prompt_tokens"') == 1


async def test_content_as_refusal_or_audio_and_logprobs_are_sent(practice: PracticeUpstream) -> None:
    refused = await said(practice, "p?deltas=2&content_as=refusal&text=no%20never")
    spoken = await said(practice, "p?deltas=2&content_as=audio")
    weighed = await said(practice, "p?deltas=1&logprobs")

    assert [delta.get("refusal") for delta in deltas(refused)[1:]] == ["no ", "never"]
    assert all("audio" in delta for delta in deltas(spoken)[1:])
    assert finishes(spoken) == []
    assert weighed[1]["choices"][0]["logprobs"]["content"][0]["token"] == deltas(weighed)[1]["content"]


async def test_packed_sends_all_choices_in_one_chunk_the_last_one_first(practice: PracticeUpstream) -> None:
    chunks = await said(practice, "p?deltas=2&choices=3&packed")

    assert [[choice["index"] for choice in chunk["choices"]] for chunk in chunks[3:]] == [[2, 1, 0]] * 2
    await asyncio.wait_for(ended(practice), 5)
    assert practice.calls[0].sent.deltas == 3 + 6
