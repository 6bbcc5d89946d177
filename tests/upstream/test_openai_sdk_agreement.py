"""The published events give what the openai SDK reads from the same bytes, wherever the SDK can read them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import httpx
import httpx2
import openai
import pytest

from streamworker.model import ErrorCode, Status, UsageSource
from streamworker.practice import PracticeUpstream, expected_text, expected_tool_calls, expected_usage
from tests.streams import Played, bytewise, chunk, data, play

Delta = tuple[int, dict[str, Any], str | None]
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7, "prompt_tokens_details": None}
MESSAGES = [{"role": "user", "content": "Count from 1 to 10."}]


class Sum(NamedTuple):
    """One choice, assembled."""

    content: str
    reasoning: str
    refusal: str
    calls: list[tuple[str, str, str]]
    finish_reason: str | None


def client(stream: bytes) -> openai.OpenAI:
    """Return the SDK with a transport that answers every call with these bytes."""
    headers = {"content-type": "text/event-stream"}
    transport = httpx2.MockTransport(lambda _request: httpx2.Response(200, headers=headers, content=stream))
    http = httpx2.Client(transport=transport)
    return openai.OpenAI(api_key="none", base_url="http://upstream/v1", max_retries=0, http_client=http)


def sdk_deltas(stream: bytes) -> tuple[list[Delta], dict[str, Any] | None]:
    """Read with the SDK, chunk by chunk: each choice delta as sent, and the last usage."""
    deltas: list[Delta] = []
    usage = None
    with client(stream) as sdk:
        for part in sdk.chat.completions.create(model="m", messages=[], stream=True):
            for choice in part.choices:
                finish_reason = choice.model_dump(exclude_unset=True).get("finish_reason")
                deltas.append((choice.index, choice.delta.model_dump(exclude_unset=True), finish_reason))
            usage = part.usage.model_dump(exclude_unset=True) if part.usage else usage
    return deltas, usage


def sdk_sums(stream: bytes) -> tuple[dict[int, Sum], dict[str, Any] | None]:
    """Let the SDK assemble the completion."""
    with client(stream) as sdk, sdk.chat.completions.stream(model="m", messages=[]) as events:
        final = events.get_final_completion()
    sums = {}
    for choice in final.choices:
        message = choice.message
        calls = [(call.id, call.function.name, call.function.arguments) for call in message.tool_calls or ()]
        reasoning = getattr(message, "reasoning_content", None) or ""
        sums[choice.index] = Sum(
            message.content or "", reasoning, message.refusal or "", calls, choice.finish_reason
        )
    return sums, final.usage.model_dump(exclude_unset=True) if final.usage else None


def our_deltas(played: Played) -> list[Delta]:
    return [
        (event.choice, event.delta, event.finish_reason)
        for event in played.deltas
        if event.choice is not None
    ]


def our_sums(played: Played) -> dict[int, Sum]:
    """Assemble the published events, as a reader of the events topic would."""
    sums = {}
    for index in sorted({index for index, _, _ in our_deltas(played)}):
        calls: dict[int, list[str]] = {}
        for event in played.deltas:
            for part in (event.delta.get("tool_calls") or ()) if event.choice == index else ():
                call = calls.setdefault(part["index"], ["", "", ""])
                call[0] = part.get("id") or call[0]
                call[1] += part["function"].get("name") or ""
                call[2] += part["function"].get("arguments") or ""
        text, reasoning, refusal = (
            played.text(index, member) for member in ("content", "reasoning_content", "refusal")
        )
        sums[index] = Sum(
            text,
            reasoning,
            refusal,
            [(call[0], call[1], call[2]) for _, call in sorted(calls.items())],
            played.end.finish_reasons.get(str(index)),
        )
    return sums


def call(index: int, arguments: str, **members: Any) -> dict[str, Any]:
    function = {"arguments": arguments} | ({"name": members.pop("name")} if "name" in members else {})
    return {"index": index, "function": function} | members


def text_of(*words: str, **members: Any) -> list[dict[str, Any]]:
    return [chunk({"content": word}, **members) for word in words]


END = chunk({}, "stop")
OWN_USAGE = chunk(choices=[], usage=USAGE)
WORDS = [
    "one ",
    "",
    "🐟",
    "👩\u200d🚀",
    "line\u2028separator",
    "next\u0085line",
    'quo"ted\\',
    "data: [DONE]\n\n",
    "\ufeff",
]

STREAMS = {
    "openai": data(
        chunk({"role": "assistant", "content": "", "refusal": None}, usage=None, obfuscation="xyz"),
        *text_of(*WORDS, usage=None, obfuscation="x"),
        chunk({}, "stop", usage=None),
        OWN_USAGE,
        b"[DONE]",
    ),
    "escaped": data(*(json.dumps(part).encode() for part in [*text_of(*WORDS), END]), b"[DONE]"),
    "printed over lines": b"".join(
        "".join(f"data: {line}\n" for line in json.dumps(part, indent=2).split("\n")).encode() + b"\n"
        for part in [*text_of(*WORDS), END]
    ),
    "no space": data(*text_of(*WORDS), END, OWN_USAGE, b"[DONE]").replace(b"data: {", b"data:{"),
    "crlf": data(*text_of(*WORDS), END, b"[DONE]", end=b"\r\n\r\n"),
    "cr": data(*text_of(*WORDS), END, b"[DONE]", end=b"\r\r"),
    "no sentinel": data(*text_of("a", "b"), END),
    "refusal": data(chunk({"role": "assistant", "refusal": ""}), chunk({"refusal": "no"}), END, b"[DONE]"),
    "two choices": data(
        chunk(choices=[{"index": i, "delta": {"role": "assistant", "content": ""}} for i in (0, 1)]),
        chunk(choices=[{"index": 1, "delta": {"content": "b"}}]),
        chunk(choices=[{"index": 0, "delta": {"content": "a"}}, {"index": 1, "delta": {"content": "b"}}]),
        chunk(choices=[{"index": 1, "delta": {}, "finish_reason": "tool_calls"}]),
        chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}]),
        b"[DONE]",
    ),
    "interleaved tool calls": data(
        chunk({"role": "assistant", "content": None}),
        chunk({"tool_calls": [call(0, "", id="call_a", type="function", name="first")]}),
        chunk({"tool_calls": [call(1, "", id="call_b", type="function", name="second")]}),
        chunk({"tool_calls": [call(0, '{"x":'), call(1, "{")]}),
        chunk({"tool_calls": [call(1, '"🐟":2}'), call(0, "1}")]}),
        chunk({}, "tool_calls"),
        b"[DONE]",
    ),
    "deepseek": b": keep-alive\n\n"
    + data(
        chunk({"role": "assistant", "content": None, "reasoning_content": ""}),
        chunk({"content": None, "reasoning_content": "hm "}),
        chunk({"content": None, "reasoning_content": "🤔"}),
        chunk({"content": "a", "reasoning_content": None}),
        chunk({"content": "", "reasoning_content": None}, "stop", usage=USAGE),
        b"[DONE]",
    ),
    "vllm with running totals": data(
        *(
            chunk(
                {"content": word},
                usage={"prompt_tokens": 1, "completion_tokens": count, "total_tokens": 1 + count},
            )
            for count, word in enumerate(WORDS)
        ),
        END,
        OWN_USAGE,
        b"[DONE]",
    ),
    "sglang": data(
        chunk({"role": "assistant", "content": "", "reasoning_content": None, "tool_calls": None}),
        chunk({"role": None, "content": "a", "reasoning_content": None, "tool_calls": None}),
        chunk(choices=[{"index": 0, "delta": {"content": None}, "finish_reason": "stop", "matched_stop": 2}]),
        OWN_USAGE,
        b"[DONE]",
    ),
    "llama.cpp": data(chunk({"role": "assistant", "content": None}))
    + b":\n\n"
    + data(*text_of(*WORDS, timings={"n": 1}), END, OWN_USAGE, b"[DONE]"),
    "azure": data(
        {"id": "", "object": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": [{}]},
        *text_of("a", "b"),
        END,
        b"[DONE]",
    ),
    "perplexity": data(
        *text_of(
            "a", "b", usage={"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}, citations=["u"]
        ),
        chunk({"content": ""}, "stop", usage=USAGE, object="chat.completion.done", citations=["u"]),
        b"[DONE]",
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_events_are_the_deltas_that_the_sdk_reads(name: str) -> None:
    """Each delta, verbatim and in order, each finish reason, and the last usage."""
    stream = STREAMS[name]
    played = play(bytewise(stream))
    deltas, usage = sdk_deltas(stream)

    assert our_deltas(played) == deltas
    assert played.end.status is Status.COMPLETED
    assert (played.end.usage if played.end.usage_source is UsageSource.UPSTREAM else None) == usage


# The SDK skips chunks with another `object`, and with them the finish reason.
PUT_TOGETHER = [name for name in STREAMS if name != "perplexity"]


@pytest.mark.parametrize("name", PUT_TOGETHER)
def test_events_give_the_completion_that_the_sdk_assembles(name: str) -> None:
    """Content, reasoning, refusal, tool calls and finish reason of every choice."""
    stream = STREAMS[name]

    assert our_sums(play(stream)) == sdk_sums(stream)[0]


@pytest.mark.parametrize(
    "error",
    [
        {"message": "the model broke", "type": "server_error", "param": None, "code": None},
        {"message": "the model broke", "type": "BadRequestError", "param": None, "code": 400},
        {"message": "the model broke", "type": "None", "param": "None", "code": "500"},
    ],
)
@pytest.mark.parametrize("sentinel", [True, False])
def test_error_frame_has_the_message_that_the_sdk_raises(error: dict[str, Any], sentinel: bool) -> None:
    """Where the SDK raises, the job's error is the same; the text before it is kept."""
    stream = data(*text_of("a", "b"), {"error": error}, *([b"[DONE]"] if sentinel else []))
    played = play(stream)
    with pytest.raises(openai.APIError) as raised:
        sdk_deltas(stream)

    assert played.end.error is not None
    assert (played.end.error.code, played.end.error.message) == (
        ErrorCode.UPSTREAM_ERROR,
        raised.value.message,
    )
    assert (played.text(), played.end.status) == ("ab", Status.INTERRUPTED)


async def practised(upstream: PracticeUpstream, model: str) -> bytes:
    """Return the bytes of one practice stream."""
    async with httpx.AsyncClient() as http:
        body = {
            "model": model,
            "messages": MESSAGES,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        answer = await http.post(f"{upstream.base_url}/chat/completions", json=body)
    assert answer.status_code == 200
    return answer.content


@pytest.mark.parametrize("usage", ["finish", "own", "running"])
@pytest.mark.parametrize("line_format", ["seed", "crlf", "cr", "unblanked"])
@pytest.mark.parametrize("options", ["deltas=40", "deltas=20&choices=3", "deltas=5&reasoning=4&tool_calls=3"])
async def test_practice_stream_gives_what_the_sdk_reads_and_what_was_sent(
    practice: PracticeUpstream, options: str, line_format: str, usage: str
) -> None:
    """Events, SDK and upstream agree. The SDK needs blank lines between events, so it gets them."""
    model = f"practice?{options}&usage={usage}&format={line_format}"
    stream = await practised(practice, model)
    blanked = stream if line_format != "unblanked" else stream.replace(b"\n", b"\n\n")
    played = play(stream)
    sums, sdk_usage = sdk_sums(blanked)
    ours = our_sums(played)

    assert our_deltas(played) == sdk_deltas(blanked)[0]
    assert ours == sums
    assert [ours[index].content for index in ours] == expected_text(model, MESSAGES)
    assert played.end.usage == sdk_usage == expected_usage(model, MESSAGES)
    expected = [
        (told["id"], told["function"]["name"], told["function"]["arguments"])
        for told in expected_tool_calls(model)
    ]
    assert ours[0].calls == expected


async def test_practice_stream_cut_into_single_bytes_is_the_same(practice: PracticeUpstream) -> None:
    """The chunking does not matter."""
    stream = await practised(practice, "practice?deltas=32&reasoning=2&tool_calls=1&choices=2&usage=own")

    assert our_sums(play(bytewise(stream))) == sdk_sums(stream)[0]
