"""One case per shape that a provider is known to send: bytes in, events and one terminal event out."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from streamworker.model import ErrorCode, Status, UsageSource
from tests.streams import NOW, bytewise, data, listening, play

if TYPE_CHECKING:
    from collections.abc import Mapping

HEAD: dict[str, Any] = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
USAGE = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
DONE = b"[DONE]"
COMPLETED, INTERRUPTED, FAILED = Status.COMPLETED, Status.INTERRUPTED, Status.FAILED
Deltas = list[tuple[int | None, dict[str, Any]]]


def of(delta: dict[str, Any] | None, finish: str | None = None, /, **members: Any) -> dict[str, Any]:
    """Return a chunk with one choice of index 0. With `delta` None the member is missing."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    return HEAD | {"choices": [choice if delta is None else choice | {"delta": delta}]} | members


def bare(*choices: dict[str, Any], **members: Any) -> dict[str, Any]:
    """Return a chunk with these choices."""
    return HEAD | {"choices": list(choices)} | members


def text(content: str) -> dict[str, Any]:
    return {"content": content}


class Shape(NamedTuple):
    """A response body and the result that it has to give."""

    stream: bytes
    deltas: Deltas
    finish: Mapping[str, str] = MappingProxyType({"0": "stop"})
    usage: dict[str, Any] | None = None
    source: UsageSource = UsageSource.ESTIMATED
    status: Status = COMPLETED
    code: ErrorCode | None = None
    message: str | None = None
    extra: Mapping[str, Any] = MappingProxyType({})  # all members of all events' `extra`


ROLE = {"role": "assistant"}
SAID: Deltas = [(0, text("a")), (0, text("b"))]
UP, PARTIAL, NONE = UsageSource.UPSTREAM, UsageSource.UPSTREAM_PARTIAL, UsageSource.NONE
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}

SHAPES = {
    # positions of members, and usage
    "openai: empty first content, usage in a last chunk of its own, padding": Shape(
        data(
            of(ROLE | text(""), usage=None, obfuscation="xY1"),
            of(text("a"), usage=None, obfuscation="x"),
            of({}, "stop", usage=None),
            HEAD | {"choices": [], "usage": USAGE, "obfuscation": ""},
            DONE,
        ),
        [(0, ROLE | text("")), (0, text("a")), (0, {})],
        usage=USAGE,
        source=UP,
    ),
    "openai: refusal": Shape(
        data(of({"refusal": "no"}), of({}, "stop"), DONE),
        [(0, {"refusal": "no"}), (0, {})],
        usage={"completion_tokens": 1},
    ),
    "openai: audio never finishes": Shape(
        data(of({"audio": {"id": "x", "data": "AA=="}}), of({"audio": {"expires_at": 1}}), DONE),
        [(0, {"audio": {"id": "x", "data": "AA=="}}), (0, {"audio": {"expires_at": 1}})],
        finish={},
        usage={"completion_tokens": 2},
    ),
    "openai: legacy function call": Shape(
        data(
            of({"function_call": {"name": "f", "arguments": ""}}),
            of({"function_call": {"arguments": "{}"}}),
            of({}, "function_call"),
            DONE,
        ),
        [
            (0, {"function_call": {"name": "f", "arguments": ""}}),
            (0, {"function_call": {"arguments": "{}"}}),
            (0, {}),
        ],
        finish={"0": "function_call"},
        usage={"completion_tokens": 1},
    ),
    "openai: custom tool": Shape(
        data(of({"tool_calls": [{"index": 0, "custom": {"name": "f", "input": "abc"}}]}, "tool_calls"), DONE),
        [(0, {"tool_calls": [{"index": 0, "custom": {"name": "f", "input": "abc"}}]})],
        finish={"0": "tool_calls"},
        usage={"completion_tokens": 1},
    ),
    "openai: moderation chunk without choices": Shape(
        data(
            of(text("a"), "stop"), HEAD | {"choices": [], "moderation": {"output": {"type": "error"}}}, DONE
        ),
        [(0, text("a")), (None, {})],
        usage={"completion_tokens": 1},
        extra={"moderation": {"output": {"type": "error"}}},
    ),
    "azure: filter chunk first, annotations without delta after the end": Shape(
        data(
            {
                "id": "",
                "object": "",
                "created": 0,
                "model": "",
                "choices": [],
                "prompt_filter_results": [{"prompt_index": 0}],
            },
            of(text("a")),
            of({}, "stop"),
            bare({"index": 0, "finish_reason": None, "content_filter_offsets": {"check_offset": 1}}),
            DONE,
        ),
        [(None, {}), (0, text("a")), (0, {}), (0, {})],
        usage={"completion_tokens": 1},
        extra={"prompt_filter_results": [{"prompt_index": 0}], "content_filter_offsets": {"check_offset": 1}},
    ),
    "azure: asynchronous filter ends the text": Shape(
        data(
            of(text("a")),
            bare({"index": 0, "finish_reason": "content_filter", "content_filter_results": {}}),
            DONE,
        ),
        [(0, text("a")), (0, {})],
        finish={"0": "content_filter"},
        usage={"completion_tokens": 1},
        extra={"content_filter_results": {}},
    ),
    "tgi: role each time, no id, finish on the last token": Shape(
        data(of(ROLE | text("a"), id=""), of(ROLE | text("b"), "stop", id=""), DONE),
        [(0, ROLE | text("a")), (0, ROLE | text("b"))],
        usage={"completion_tokens": 1},
    ),
    "sglang: every key there as null": Shape(
        data(
            of({"role": None, "content": None, "reasoning_content": None, "tool_calls": None}),
            of({"role": None, "content": "a", "reasoning_content": None, "tool_calls": None}),
            bare({"index": 0, "delta": {"content": None}, "finish_reason": "stop", "matched_stop": 2}),
            HEAD | {"choices": [], "usage": USAGE},
            DONE,
        ),
        [
            (0, {"role": None, "content": None, "reasoning_content": None, "tool_calls": None}),
            (0, {"role": None, "content": "a", "reasoning_content": None, "tool_calls": None}),
            (0, {"content": None}),
        ],
        usage=USAGE,
        source=UP,
        extra={"matched_stop": 2},
    ),
    "vllm: running totals, stop_reason": Shape(
        data(
            of(text("a"), usage={"completion_tokens": 1}),
            bare(
                {"index": 0, "delta": text("b"), "finish_reason": "stop", "stop_reason": None},
                usage={"completion_tokens": 2},
            ),
            HEAD | {"choices": [], "usage": {"completion_tokens": 2}},
            DONE,
        ),
        SAID,
        usage={"completion_tokens": 2},
        source=UP,
    ),
    "vllm: running totals cut off": Shape(
        data(of(text("a"), usage={"completion_tokens": 1}), of(text("b"), usage={"completion_tokens": 2})),
        SAID,
        finish={},
        usage={"completion_tokens": 2},
        source=PARTIAL,
        status=INTERRUPTED,
        code=ErrorCode.TRUNCATED,
    ),
    "openrouter: comments, finish twice, usage with the second": Shape(
        b": OPENROUTER PROCESSING\n\n"
        + data(of(text("a"), provider="P"))
        + b": OPENROUTER PROCESSING\n\n"
        + data(of({}, "stop", provider="P"), of({}, "stop", provider="P", usage=USAGE | {"cost": 0.1}), DONE),
        [(0, text("a")), (0, {}), (0, {})],
        usage=USAGE | {"cost": 0.1},
        source=UP,
        extra={"provider": "P"},
    ),
    "groq: usage under x_groq only": Shape(
        data(
            of(ROLE, x_groq={"id": "r"}),
            of(text("a")),
            of({}, "stop", x_groq={"id": "r", "usage": USAGE}),
            DONE,
        ),
        [(0, ROLE), (0, text("a")), (0, {})],
        usage=USAGE,
        source=UP,
        extra={"x_groq": {"id": "r", "usage": USAGE}},
    ),
    "kimi: usage in the choice, no object": Shape(
        data(
            {
                "id": "c",
                "choices": [{"index": 0, "delta": text("a"), "finish_reason": "stop", "usage": USAGE}],
            },
            DONE,
        ),
        [(0, text("a"))],
        usage=USAGE,
        source=UP,
    ),
    "mistral: content in parts, then plain": Shape(
        data(
            of({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]}),
            of({"content": [{"type": "text", "text": "a"}]}),
            of(text("b"), "stop", usage=USAGE),
            DONE,
        ),
        [
            (0, {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]}),
            (0, {"content": [{"type": "text", "text": "a"}]}),
            (0, text("b")),
        ],
        usage=USAGE,
        source=UP,
    ),
    "perplexity: running totals, another object at the end": Shape(
        data(
            of(ROLE | text("a"), usage={"completion_tokens": 1}, citations=["u"]),
            of(
                ROLE | text("b"),
                "stop",
                usage={"completion_tokens": 2},
                object="chat.completion.done",
                citations=["u"],
            ),
            DONE,
        ),
        [(0, ROLE | text("a")), (0, ROLE | text("b"))],
        usage={"completion_tokens": 2},
        source=UP,
        extra={"citations": ["u"]},
    ),
    "deepseek: keep-alives, reasoning, usage with the end": Shape(
        b": keep-alive\n\n: keep-alive\n\n"
        + data(
            of(ROLE | {"content": None, "reasoning_content": "hm"}),
            of({"content": "a", "reasoning_content": None}),
            of({"content": "", "reasoning_content": None}, "insufficient_system_resource", usage=USAGE),
            DONE,
        ),
        [
            (0, ROLE | {"content": None, "reasoning_content": "hm"}),
            (0, {"content": "a", "reasoning_content": None}),
            (0, {"content": "", "reasoning_content": None}),
        ],
        finish={"0": "insufficient_system_resource"},
        usage=USAGE,
        source=UP,
    ),
    "llama.cpp: null first, pings, timings": Shape(
        data(of(ROLE | {"content": None}))
        + b":\n\n"
        + data(
            of(text("a"), timings={"n": 1}),
            of({}, "stop", timings={"n": 2}),
            HEAD | {"choices": [], "usage": USAGE},
            DONE,
        ),
        [(0, ROLE | {"content": None}), (0, text("a")), (0, {})],
        usage=USAGE,
        source=UP,
        extra={"timings": {"n": 2}},
    ),
    "cerebras, xai: keys missing": Shape(
        data(
            {"id": "1", "choices": [{"delta": ROLE, "index": 0}], "model": "m"},
            {"id": "2", "choices": [{"delta": text("a"), "index": 0}], "model": "m"},
            {
                "id": "3",
                "choices": [{"delta": {}, "finish_reason": "stop", "index": 0}],
                "usage": USAGE,
                "time_info": {"t": 1},
            },
            DONE,
        ),
        [(0, ROLE), (0, text("a")), (0, {})],
        usage=USAGE,
        source=UP,
        extra={"time_info": {"t": 1}},
    ),
    "gemini: no index anywhere, thought signature, finish stop after a call": Shape(
        data(
            {
                "choices": [
                    {
                        "delta": {
                            "tool_calls": [CALL | {"extra_content": {"google": {"thought_signature": "s"}}}]
                        },
                        "finish_reason": "stop",
                    }
                ],
                "model": "m",
            },
            DONE,
        ),
        [(0, {"tool_calls": [CALL | {"extra_content": {"google": {"thought_signature": "s"}}}]})],
        usage={"completion_tokens": 1},
    ),
    "together: text beside the delta": Shape(
        data(
            bare(
                {
                    "index": 0,
                    "delta": ROLE | text("a"),
                    "text": "a",
                    "seed": 4,
                    "finish_reason": "stop",
                    "logprobs": None,
                }
            ),
            DONE,
        ),
        [(0, ROLE | text("a"))],
        usage={"completion_tokens": 1},
        extra={"text": "a", "seed": 4},
    ),
    "several choices in one chunk and out of order": Shape(
        data(
            bare({"index": 1, "delta": text("b")}, {"index": 0, "delta": text("a")}),
            bare({"index": 0, "delta": {}, "finish_reason": "stop"}),
            bare({"index": 1, "delta": {}, "finish_reason": "length"}),
            DONE,
        ),
        [(1, text("b")), (0, text("a")), (0, {}), (1, {})],
        finish={"0": "stop", "1": "length"},
        usage={"completion_tokens": 1},
    ),
    # tool calls are passed on unchanged; readers decide which fragments belong to one call
    "nim: no arguments first, empty tail": Shape(
        data(
            of({"tool_calls": [{"index": 0, "id": "1", "function": {"name": "f"}}]}),
            of({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}),
            of({"tool_calls": []}, "tool_calls"),
            DONE,
        ),
        [
            (0, {"tool_calls": [{"index": 0, "id": "1", "function": {"name": "f"}}]}),
            (0, {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}),
            (0, {"tool_calls": []}),
        ],
        finish={"0": "tool_calls"},
        usage={"completion_tokens": 1},
    ),
    # reasoning
    "gateway: reasoning under two names is one": Shape(
        data(of({"reasoning_content": "abcd", "reasoning": "abcd"}), of({}, "stop"), DONE),
        [(0, {"reasoning_content": "abcd", "reasoning": "abcd"}), (0, {})],
        usage={"completion_tokens": 1},
    ),
    # errors
    "openai: error frame, then the sentinel": Shape(
        data(
            of(text("a")),
            {"error": {"message": "m", "type": "server_error", "param": None, "code": None}},
            DONE,
        ),
        [(0, text("a"))],
        finish={},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.UPSTREAM_ERROR,
        message="m",
    ),
    "vllm: error with a number, then the sentinel": Shape(
        data({"error": {"message": "m", "type": "BadRequestError", "param": None, "code": 400}}, DONE),
        [],
        finish={},
        source=NONE,
        status=FAILED,
        code=ErrorCode.UPSTREAM_ERROR,
        message="m",
    ),
    "older vllm: flat error": Shape(
        data(of(text("a")), {"object": "error", "message": "m", "type": "t", "code": 400}, DONE),
        [(0, text("a"))],
        finish={},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.UPSTREAM_ERROR,
        message="m",
    ),
    "sglang: abort": Shape(
        data({"error": {"object": "error", "message": "m", "code": 500}}, DONE),
        [],
        finish={},
        source=NONE,
        status=FAILED,
        code=ErrorCode.UPSTREAM_ERROR,
        message="m",
    ),
    "llama.cpp: error without a sentinel": Shape(
        data(of(text("a")), {"error": {"code": 500, "message": "m", "type": "server_error"}}),
        [(0, text("a"))],
        finish={},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.UPSTREAM_ERROR,
        message="m",
    ),
    "older llama.cpp: error as a field": Shape(
        data(of(text("a"))) + b'error: {"code":500,"message":"m","type":"server_error"}\n\n' + data(DONE),
        [(0, text("a"))],
        finish={},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.UPSTREAM_ERROR,
        message="m",
    ),
    "openrouter: error beside choices": Shape(
        data(of(text("a")), of({"content": "b"}, "error", error={"code": "server_error", "message": "m"})),
        SAID,
        finish={"0": "error"},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.UPSTREAM_ERROR,
        message="m",
    ),
    "groq, lm studio: event called error": Shape(
        b"event: error\n" + data({"error": {"message": "m"}}),
        [],
        finish={},
        source=NONE,
        status=FAILED,
        code=ErrorCode.UPSTREAM_ERROR,
        message="m",
    ),
    "event called error, flat": Shape(
        data(of(text("a"))) + b"event: error\n" + data({"message": "m"}, DONE),
        [(0, text("a"))],
        finish={},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.UPSTREAM_ERROR,
        message="m",
    ),
    "tgi: error string": Shape(
        data(of(text("a")), {"error": "m", "error_type": "generation"}),
        [(0, text("a"))],
        finish={},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.UPSTREAM_ERROR,
        message="m",
    ),
    "groq: error under x_groq": Shape(
        data(of(text("a")), of({}, None, x_groq={"error": "m"}), DONE),
        [(0, text("a")), (0, {})],
        finish={},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.UPSTREAM_ERROR,
        message="m",
        extra={"x_groq": {"error": "m"}},
    ),
    "litellm: traceback": Shape(
        data(
            of(text("a")),
            {"error": {"message": "m\nTraceback", "type": "None", "param": "None", "code": "500"}},
        ),
        [(0, text("a"))],
        finish={},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.UPSTREAM_ERROR,
        message="m\nTraceback",
    ),
    "ollama: silent, an empty chunk and the end": Shape(
        data(of(text("a")), HEAD | {"choices": []}),
        [(0, text("a"))],
        finish={},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.TRUNCATED,
    ),
    "ollama: silent, an empty delta and the end": Shape(
        data(of(text("a")), of({"content": ""})),
        [(0, text("a")), (0, text(""))],
        finish={},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.TRUNCATED,
    ),
    "any: errors that say nothing are none": Shape(
        data(of(text("a"), error=None), {"error": {}}, {"error": ""}, of({}, "stop"), DONE),
        [(0, text("a")), (0, {})],
        usage={"completion_tokens": 1},
    ),
    "any: html with status 200": Shape(
        b"<!DOCTYPE html>\n<html>\n\n</html>\n",
        [],
        finish={},
        source=NONE,
        status=FAILED,
        code=ErrorCode.TRUNCATED,
    ),
    "any: an event that is not json": Shape(
        data(of(text("a")), b"Internal Server Error"),
        [(0, text("a"))],
        finish={},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.UPSTREAM_PROTOCOL,
    ),
    # ends of a stream
    "any: no sentinel but finished": Shape(
        data(of(text("a")), of(text("b"), "stop")), SAID, usage={"completion_tokens": 1}
    ),
    "any: one choice of two finished, then nothing": Shape(
        data(
            bare({"index": 0, "delta": text("a"), "finish_reason": "stop"}, {"index": 1, "delta": text("b")})
        ),
        [(0, text("a")), (1, text("b"))],
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.TRUNCATED,
    ),
    "microsoft: blanks around the sentinel": Shape(
        data(of(text("a"), "stop")) + b"data: [DONE] \n\n" + data(b"junk"),
        [(0, text("a"))],
        usage={"completion_tokens": 1},
    ),
    "any: the sentinel's words as text": Shape(
        data(of(text("data: [DONE]\n\n")), of({}, "stop"), DONE),
        [(0, text("data: [DONE]\n\n")), (0, {})],
        usage={"completion_tokens": 4},
    ),
    "any: cut off inside a character": Shape(
        data(of(text("a"))) + b'data: {"choices":[{"delta":{"content":"\xf0\x9f',
        [(0, text("a"))],
        finish={},
        usage={"completion_tokens": 1},
        status=INTERRUPTED,
        code=ErrorCode.TRUNCATED,
    ),
    # keep-alives of every kind
    "any: every kind of ping": Shape(
        b"retry: 3000\n\nevent: ping\n\n:\n\n\n\ndata:\n\nid: 5\n\n"
        + data({"type": "ping"}, b"null", b"{}")
        + b'event: ping\ndata: {"type":"ping"}\n\n'
        + data(of(text("a"), "stop"), DONE),
        [(0, text("a"))],
        usage={"completion_tokens": 1},
    ),
}


@pytest.mark.parametrize("cut", ["whole", "bytewise"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shape_gives_its_deltas_and_its_end(shape: Shape, cut: str) -> None:
    """Deltas are verbatim, the end and the error are right, and the counts match what was sent."""
    played = play(shape.stream if cut == "whole" else bytewise(shape.stream))
    end = played.end
    extra: dict[str, Any] = {}
    for event in played.deltas:
        extra |= event.extra or {}

    assert [(event.choice, event.delta) for event in played.deltas] == shape.deltas
    assert extra == shape.extra
    assert (end.status, end.finish_reasons) == (shape.status, shape.finish)
    assert (end.usage, end.usage_source) == (shape.usage, shape.source)
    assert (end.error and end.error.code) == shape.code
    if shape.message is not None:
        assert end.error is not None
        assert end.error.message == shape.message
    assert end.seq == 1 + len(played.deltas)


# The printed sample of one provider's documentation has no blank lines between events.
SAMPLE = [
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"apertus-70b-instruct","choices":[{"index":0,"delta":{"role":"assistant"}}]}',
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"apertus-70b-instruct","choices":[{"index":0,"delta":{"content":"Ciao"}}]}',
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","model":"apertus-70b-instruct","choices":[{"index":0,"delta":{"content":"!"},"finish_reason":"stop"}],"usage":{"prompt_tokens":15,"completion_tokens":2}}',
    b"data: [DONE]",
]


def test_printed_sample_streams_live() -> None:
    """From the second line on, each delta is returned as soon as its line is complete."""
    attempt = listening()
    live = [[event.delta for event in attempt.receive(line + b"\n", NOW)] for line in SAMPLE]

    assert live == [[], [{"role": "assistant"}, {"content": "Ciao"}], [{"content": "!"}], []]
    assert attempt.status is COMPLETED


def test_printed_sample_with_blank_lines_streams_live_from_the_first_line() -> None:
    """The same sample in the form in which the server most likely sends it."""
    attempt = listening()
    live = [[event.delta for event in attempt.receive(line + b"\n\n", NOW)] for line in SAMPLE]

    assert live == [[{"role": "assistant"}], [{"content": "Ciao"}], [{"content": "!"}], []]
    assert attempt.status is COMPLETED


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r", b"\n\n"])
@pytest.mark.parametrize("last", [b"", None])
@pytest.mark.parametrize("cut", ["whole", "bytewise"])
def test_printed_sample_in_every_format_gives_the_same_result(
    newline: bytes, last: bytes | None, cut: str
) -> None:
    """Blank lines or none, any line end, with and without the last one: same text, same counts."""
    stream = newline.join(SAMPLE) + (newline if last is None else last)
    played = play(stream if cut == "whole" else bytewise(stream))

    assert played.text() == "Ciao!"
    assert (played.end.seq, played.end.status, played.end.finish_reasons) == (4, COMPLETED, {"0": "stop"})
    assert (played.end.usage, played.end.usage_source) == ({"prompt_tokens": 15, "completion_tokens": 2}, UP)
