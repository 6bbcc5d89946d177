"""The seed corpus: inputs that reach most of each target, and every input that has broken one."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from fuzz import http1
from tests.streams import chunk, data

__all__ = ["seeds_of"]

VECTORS = Path(__file__).parents[2] / "shared" / "vectors" / "sse"

_COMPLETIONS = (
    data(chunk({"role": "assistant", "content": ""}), chunk({"content": "Hi"}), chunk({}, "stop"), b"[DONE]"),
    b'data: {"choices":[{"delta":{"content":"\\ud83d"}}]}\n\ndata: {"choices":[{"delta":{"content":"\\ude00"}}]}\n\n',
    data(
        chunk({"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{"}}]}),
        b"[DONE]",
    ),
    data({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}, "x": {"y": [None]}}),
    data({"error": {"message": "no", "code": 500}}, b"[DONE]"),
    b'event: error\ndata: {"message":"no"}\n\nerror: {"code":1}\n\n',
    b"\xef\xbb\xbf: hello\rid: 1\rretry: 10\rdata:[DONE]\r\r",
)
_JOB = {
    "job_id": "j-1",
    "request": {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream_options": {"a": 1}},
    "upstream": "default",
    "deadline": "2030-01-31T12:00:00Z",
    "reply_to": "t",
    "on_break": "restart",
    "metadata": {"a": "b"},
}
_STARTED = {"v": 1, "type": "started", "job_id": "j", "attempt": "a", "seq": 0, "ts": 1}
_SEEDS: dict[str, tuple[bytes, ...]] = {
    "event_stream": _COMPLETIONS,
    "completion": _COMPLETIONS,
    "job": (
        json.dumps(_JOB).encode(),
        b'{"request":{"model":"\\ud800","messages":[1]}}',
        b'{"job_id":1,"x":[]}',
    ),
    "control": (b'{"v":1,"type":"cancel","job_id":"j","reason":"r"}',),
    "event": (
        json.dumps(_STARTED).encode(),
        json.dumps(_STARTED | {"type": "delta", "choice": 0, "delta": {"content": "x"}}).encode(),
        json.dumps(
            _STARTED | {"type": "usage", "status": "completed", "finish_reasons": {"0": "stop"}}
        ).encode(),
    ),
    "error_body": (
        b'{"error":{"message":"no","type":"t","code":"c"}}',
        b'[{"error":"x"}]',
        b"<html>502</html>",
    ),
    "json": (b'{"a":[1,1e9,-0.5,"\\ud800",null,true]}', b"123456789012345678901234567890", b"[[[[]]]]"),
    "http_response": http1.SEEDS,
}


def seeds_of(target: str) -> list[bytes]:
    """Return the seed inputs of a target; for streams also the public vectors, if they are available."""
    seeds = list(_SEEDS[target])
    if target in {"event_stream", "completion"}:
        for file in sorted(VECTORS.glob("*.json")):
            inputs = (base64.b64decode(vector["input_b64"]) for vector in json.loads(file.read_bytes()))
            seeds += [one for one in inputs if len(one) <= 4096]
    return seeds
