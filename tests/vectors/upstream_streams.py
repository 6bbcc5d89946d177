"""Response bodies that upstreams are known to send, what they contain, and how the job has to end.

Each kind is the habit of a server or a relay: errors outside `error`, finish reasons that report a failure, keep-alives inside
`data`, choices that finish too early, bodies that are nearly JSON, running totals of zero, and halves of characters.
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["STREAMS"]

USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}


def _chunk(delta: dict[str, Any] | None, finish_reason: str | None = None, **members: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    return _data(msgspec.json.encode({"id": "gen-1", "model": "owl", "choices": choices} | members))


def _data(payload: bytes) -> bytes:
    return b"data: " + payload + b"\n\n"


def _text(*texts: str, **members: Any) -> bytes:
    return b"".join(_chunk({"content": text}, **members) for text in texts)


_DONE = _data(b"[DONE]")
_STOP = _chunk({}, "stop")
_TAIL = _chunk(None, usage=USAGE) + _DONE


def _case(
    stream: bytes,
    status: str,
    *,
    text: str = "",
    finish: str | None = None,
    usage: dict[str, int] | None = None,
    reasoning: str = "",
    tool_calls: list[dict[str, Any]] | None = None,
    **want: Any,
) -> dict[str, Any]:
    """Return a case. `want` states further members of the terminal event, `words` a part of `error.message`."""
    expect = {
        "text_by_choice": {"0": text} if text else {},
        "reasoning_by_choice": {"0": reasoning} if reasoning else {},
        "tool_calls": tool_calls or [],
        "finish_reasons": {"0": finish} if finish else {},
        "usage": usage,
    }
    return {"stream": stream, "expect": expect, "want": {"status": status} | want}


STREAMS: dict[str, dict[str, Any]] = {
    "an error inside a choice": _case(
        _text("The owl ", "sleeps")
        + _chunk({"content": ""}, "error", choices=[{"index": 0, "delta": {"content": ""}, "finish_reason": "error",
            "error": {"code": 503, "message": "the node was drained"}}])
        + _DONE,
        "interrupted", text="The owl sleeps", finish="error", words="the node was drained", error_code="upstream_error",
    ),
    "an error in two flat members": _case(
        _data(b'{"choices":null,"error_type":"InvalidInput","error_message":"the image is too wide"}') + _DONE,
        "failed", words="the image is too wide", error_code="upstream_error",
    ),
    "an error in a status object": _case(
        _data(b'{"choices":null,"base_resp":{"status_code":1004,"status_msg":"no such group"}}') + _DONE,
        "failed", words="no such group", error_code="upstream_error",
    ),
    "an error in flat members beside an unfinished choice": _case(
        _text("The owl ", "sleeps") + _chunk({"content": ""}, error_code=1305, error_msg="the model is busy") + _DONE,
        "interrupted", text="The owl sleeps", words="the model is busy", error_code="upstream_error",
    ),
    "a failing number beside an unfinished choice, before any text": _case(
        _chunk({"content": ""}, code=10013, message="the input was refused") + _DONE,
        "failed", words="the input was refused", error_code="upstream_error",
    ),
    "an error inside a delta": _case(
        _text("The owl ", "sleeps") + _chunk({"error": {"message": "the node was drained", "code": 503}}) + _DONE,
        "interrupted", text="The owl sleeps", words="the node was drained", error_code="upstream_error", retriable=True,
    ),
    "a failing name beside an unfinished choice": _case(
        _text("The owl ", "sleeps") + _chunk({}, code="InternalError", message="the node was drained") + _DONE,
        "interrupted", text="The owl sleeps", words="the node was drained", error_code="upstream_error",
    ),
    "a failing name beside choices that go on": _case(
        _text("The owl ", "sleeps", code="NodeBusy", message="hold on") + _STOP + _TAIL,
        "completed", text="The owl sleeps", finish="stop", usage=USAGE,
    ),
    "numbers of unknown members after text without an end": _case(
        _text("The owl ", "sleeps") + _data(b'{"took_s":0.5}') + _DONE,
        "completed", text="The owl sleeps",
    ),
    "an object of unknown members after text": _case(
        _text("The owl ", "sleeps") + _data(b'{"streamException":{"say":"the node was drained"}}') + _DONE,
        "interrupted", text="The owl sleeps", words="the node was drained", error_code="upstream_error",
    ),
    "an object of unknown members between texts": _case(
        _text("The owl ") + _data(b'{"progress":0.5}') + _text("sleeps") + _DONE,
        "completed", text="The owl sleeps",
    ),
    "an object of unknown members behind the end": _case(
        _text("The owl ", "sleeps") + _STOP + _data(b'{"took_s":0.5}') + _TAIL,
        "completed", text="The owl sleeps", finish="stop", usage=USAGE,
    ),
    "an error as a detail": _case(
        _data(b'{"detail":"the model is being unloaded"}') + _DONE,
        "failed", words="the model is being unloaded", error_code="upstream_error",
    ),
    "a finish reason that reports a failure": _case(
        _text("Half an ", "answer") + _chunk({}, "upstream_error") + _TAIL,
        "interrupted", text="Half an answer", finish="upstream_error", usage=USAGE,
    ),
    "an error object without content": _case(
        _text("All ", "is well", error={"message": "", "type": "", "code": None}) + _STOP + _TAIL,
        "completed", text="All is well", finish="stop", usage=USAGE,
    ),
    "a code of zero beside the choices": _case(
        _text("Zero ", "means success", code=0, message="ok") + _STOP + _TAIL,
        "completed", text="Zero means success", finish="stop", usage=USAGE,
    ),
    "a comment as data": _case(
        _text("one ") + _data(b": still here") + _text("two") + _data(b": still here") + _STOP + _TAIL,
        "completed", text="one two", finish="stop", usage=USAGE,
    ),
    "text under a named ping": _case(
        _text("ping ") + b"event: ping\ndata: 2026-11-01 10:00:00\n\n" + _text("pong") + _STOP + _TAIL,
        "completed", text="ping pong", finish="stop", usage=USAGE,
    ),
    "text under a named ping in capitals": _case(
        _text("ping ") + b"event: PING\ndata: .\n\n" + _text("pong") + _STOP + _TAIL,
        "completed", text="ping pong", finish="stop", usage=USAGE,
    ),
    "the string None as a finish reason, then a cut": _case(
        _chunk({"content": "not "}, "None") + _chunk({"content": "yet"}, "NULL"),
        "interrupted", text="not yet", error_code="truncated",
    ),
    "a whole completion as one event": _case(
        _data(b'{"object":"chat.completion","choices":[{"index":0,"message":{"role":"assistant","content":"All at once"},'
              b'"finish_reason":"stop"}]}') + _TAIL,
        "completed", text="All at once", finish="stop", usage=USAGE,
    ),
    "a whole completion after its deltas": _case(
        _text("Bit ", "by bit")
        + _data(b'{"object":"chat.completion.done","choices":[{"index":0,"message":{"role":"assistant","content":"Bit by bit"},'
                b'"finish_reason":"stop"}]}') + _TAIL,
        "completed", text="Bit by bit", finish="stop", usage=USAGE,
    ),
    "a finish reason on every chunk": _case(
        _chunk({"reasoning_content": "let me see"}, "stop") + _chunk({"content": "seen "}, "stop")
        + _chunk({"content": "all"}, "stop") + _TAIL,
        "completed", text="seen all", reasoning="let me see", finish="stop", usage=USAGE,
    ),
    "the string null as a finish reason": _case(
        _chunk({"content": "not "}, "null") + _chunk({"content": "yet"}, "null") + _STOP + _TAIL,
        "completed", text="not yet", finish="stop", usage=USAGE,
    ),
    "a finish reason before the text, then a cut": _case(
        _chunk({"role": "assistant"}, "stop") + _text("It stops h"),
        "interrupted", text="It stops h", error_code="truncated", fin=None,
    ),
    "an error document without data": _case(
        b'{"error":{"code":400,"message":"9000 tokens do not fit into 8192","type":"invalid_request_error"}}',
        "failed", words="9000 tokens do not fit", retriable=False,
    ),
    "a doubled field name behind the end": _case(
        _text("said ", "twice") + _STOP + b"data: " + _chunk(None, usage=USAGE) + _DONE,
        "completed", text="said twice", finish="stop", usage=USAGE,
    ),
    "a tabulator inside a string": _case(
        _data(b'{"choices":[{"index":0,"delta":{"content":"a\tb"},"finish_reason":null}]}') + _STOP + _TAIL,
        "completed", text="a\tb", finish="stop", usage=USAGE,
    ),
    "running totals of zero, then a cut": _case(
        _text("It was ", "counted", usage={"total_tokens": 0}),
        "interrupted", text="It was counted", error_code="truncated", usage_source="estimated",
    ) ,
    "half a character in the text": _case(
        _data(b'{"choices":[{"index":0,"delta":{"content":"owl \\ud83e"},"finish_reason":null}]}')
        + _data(b'{"choices":[{"index":0,"delta":{"content":"\\udd89!"},"finish_reason":null}]}') + _STOP + _TAIL,
        "completed", text="owl \U0001f989!", finish="stop", usage=USAGE,
    ),
    "half a character in the arguments of a tool call": _case(
        _data(b'{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"id":"call_7","type":"function",'
              b'"function":{"name":"draw","arguments":"{\\"what\\":\\"\\ud83e"}}]},"finish_reason":null}]}')
        + _data(b'{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"\\udd89\\"}"}}]},'
                b'"finish_reason":null}]}')
        + _chunk({}, "tool_calls") + _TAIL,
        "completed", finish="tool_calls", usage=USAGE,
        tool_calls=[{"choice": 0, "index": 0, "id": "call_7", "name": "draw", "arguments": '{"what":"\U0001f989"}'}],
    ),
}  # fmt: skip
"""Cases by name: `stream` the body, `expect` its content, `want` members of the terminal event.

`"fin": None` in `want` means that finish reasons are not compared.
"""
