"""The model name is the script: what the practice upstream does is chosen by whoever asks.

A model is a base name, then options as in a URL's query: `practice?deltas=50&pace_ms=20`. Values are
percent-decoded. An option that is unknown, repeated, out of range or at odds with another is refused (400),
so that a misspelt fault never passes for a healthy stream.

What is said
    ==================== ============ ===================================================================
    option               default      meaning
    ==================== ============ ===================================================================
    deltas=N             20           content deltas per choice; with `text` given: its number of words
    text=TEXT            counting     the words to say, one word or punctuation run per delta, repeated as
                                      often as `deltas` asks
    choices=N            request's n  choices, their deltas interleaved
    reasoning[=N]        0 (bare: 3)  `reasoning_content` deltas before the content
    tool_calls[=N]       0 (bare: 1)  tool calls after the content, in fragments; finish_reason "tool_calls"
    big_delta=N          -            the first content delta of each choice is N bytes of UTF-8
    usage=WHERE          finish       `finish`: in the chunk with the last finish_reason, as the seed does;
                                      `own`: a last chunk with choices [], only if the request's
                                      stream_options.include_usage is true; `running`: a running total in
                                      every chunk; `none`: never
    no_done              -            the stream ends without [DONE]
    ==================== ============ ===================================================================

How it is sent
    ==================== ============ ===================================================================
    format=F             seed         line ends: `seed` LF LF, `unblanked` LF (no blank lines, the seed page
                                      as printed), `crlf` CRLF CRLF, `cr` CR CR
    framing=F            chunked      `close`: Connection: close and no length, so that a cut looks like a
                                      clean end of the body
    chunk_bytes=N        -            the body goes out N bytes at a time, each its own HTTP chunk and write
    slow_headers_ms=N    0            silence before the response head
    first_delta_ms=N     0            silence between the head and the first chunk
    pace_ms=N            0            time from one delta to the next (role deltas are not paced)
    ==================== ============ ===================================================================

What goes wrong, at most one of these. `_after=N` counts all deltas but the role deltas; 0 is right after the
response head, before any chunk.
    ======================== ============================================================================
    break_after=N            the connection is reset (RST)
    close_after=N            the connection is closed (FIN) without the end of the body
    cut_utf8_after=N         as close_after, in the middle of a multi-byte character of the next delta
    stall_after=N            silence, the connection stays open
    ping_stall_after=N       `: ping` comments every ping_ms (default 100), never another delta
    error_frame_after=N      a chunk with `error`, then the end of the body, no [DONE]
    error_then_done_after=N  a chunk with `error`, then [DONE]
    endless_line             after the role delta a data line that never ends
    status=N                 an HTTP error, 400-599, as JSON; with retry_after=VALUE, retry_after_ms=N and
                             code=TEXT (the error's code) beside it
    html200                  status 200 and a page of HTML
    json200                  status 200 and the whole completion as application/json
    ======================== ============================================================================

    times=N                  only the first N calls of this very model name go wrong, later ones go well

Without `stream: true` the answer is the whole completion as JSON; `status`, `html200` and `slow_headers_ms`
hold there too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import parse_qsl

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_DELTAS: Final = 20


class ScriptError(ValueError):
    """A model name whose options cannot be played; the message is meant for the caller."""


class Fault(StrEnum):
    """A way for a stream to go wrong after some deltas; the value is the option's name."""

    BREAK = "break_after"
    CLOSE = "close_after"
    CUT_UTF8 = "cut_utf8_after"
    STALL = "stall_after"
    PING_STALL = "ping_stall_after"
    ERROR_FRAME = "error_frame_after"
    ERROR_THEN_DONE = "error_then_done_after"


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """One model name, read. Field names are the option names; times are milliseconds."""

    name: str
    deltas: int | None = None
    text: str | None = None
    choices: int | None = None
    reasoning: int = 0
    tool_calls: int = 0
    big_delta: int | None = None
    usage: Literal["finish", "own", "none", "running"] = "finish"
    no_done: bool = False
    format: Literal["seed", "unblanked", "crlf", "cr"] = "seed"
    framing: Literal["chunked", "close"] = "chunked"
    chunk_bytes: int | None = None
    slow_headers_ms: float = 0
    first_delta_ms: float = 0
    pace_ms: float = 0
    fault: Fault | None = None
    after: int = 0
    ping_ms: float = 100
    endless_line: bool = False
    status: int | None = None
    retry_after: str | None = None
    retry_after_ms: float | None = None
    code: str | None = None
    html200: bool = False
    json200: bool = False
    times: int | None = None

    def well(self) -> Script:
        """The same stream with nothing going wrong."""
        return replace(self, fault=None, endless_line=False, status=None, html200=False, json200=False)


def parse(model: str) -> Script:
    """Read a model name; raises ScriptError that names every option at fault."""
    name, _, query = model.partition("?")
    given = parse_qsl(query, keep_blank_values=True)
    values, faults = _convert(given)
    if faults:
        raise ScriptError("; ".join(faults))
    return _checked(Script(name=name, **values))


def _convert(given: list[tuple[str, str]]) -> tuple[dict[str, Any], list[str]]:
    values: dict[str, Any] = {}
    faults: list[str] = []
    names = [name for name, _ in given]
    faults += [f"option {name!r} is given twice" for name in sorted({n for n in names if names.count(n) > 1})]
    wrongs = [name for name in names if name in _WRONGS]
    if len(wrongs) > 1:
        faults.append("only one thing can go wrong: " + ", ".join(wrongs))
    for name, text in given:
        try:
            values |= _value(name, text)
        except ValueError as error:
            faults.append(str(error))
    return values, faults


def _value(name: str, text: str) -> dict[str, Any]:
    if name not in _OPTIONS:
        raise ValueError(f"unknown option {name!r}")
    try:
        value = _OPTIONS[name](text)
    except ValueError as error:
        raise ValueError(f"option {name!r}: {error}") from None
    if name in _AFTER:
        return {"fault": Fault(name), "after": value}
    return {name: value}


def _checked(script: Script) -> Script:
    if not script.name:
        raise ScriptError("the model has no base name")
    if script.text is not None and not script.text:
        raise ScriptError("option 'text': must not be empty")
    if script.status is None and (script.retry_after or script.retry_after_ms is not None or script.code):
        raise ScriptError("retry_after, retry_after_ms and code need status")
    return script


def _count(low: int, high: int, bare: int | None = None) -> Callable[[str], int]:
    def convert(text: str) -> int:
        if not text and bare is not None:
            return bare
        # int() takes "+5", "1_000" and other alphabets' digits, none of which anyone means here.
        if not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"must be a number from {low} to {high}, not {text!r}")
        return int(text)

    return convert


def _milliseconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text):
        raise ValueError(f"must be milliseconds, not {text!r}")
    return float(text)


def _one_of(*words: str) -> Callable[[str], str]:
    def convert(text: str) -> str:
        if text not in words:
            raise ValueError(f"must be one of {', '.join(words)}, not {text!r}")
        return text

    return convert


def _flag(text: str) -> bool:
    if text not in {"", "1", "true"}:
        raise ValueError(f"takes no value, not {text!r}")
    return True


def _header_value(text: str) -> str:
    if not re.fullmatch(r"[!-~]([ -~]*[!-~])?", text):
        raise ValueError("must be printable ASCII")
    return text


_AFTER: Final = frozenset(fault.value for fault in Fault)
_WRONGS: Final = _AFTER | {"endless_line", "status", "html200", "json200"}
_OPTIONS: Final[dict[str, Callable[[str], object]]] = {
    "deltas": _count(0, 10_000_000),
    "text": str,
    "choices": _count(1, 128),
    "reasoning": _count(0, 1_000_000, bare=3),
    "tool_calls": _count(0, 1_000, bare=1),
    "big_delta": _count(1, 256 * 1024 * 1024),
    "usage": _one_of("finish", "own", "none", "running"),
    "no_done": _flag,
    "format": _one_of("seed", "unblanked", "crlf", "cr"),
    "framing": _one_of("chunked", "close"),
    "chunk_bytes": _count(1, 1024 * 1024),
    "slow_headers_ms": _milliseconds,
    "first_delta_ms": _milliseconds,
    "pace_ms": _milliseconds,
    "ping_ms": _milliseconds,
    "endless_line": _flag,
    "status": _count(400, 599),
    "retry_after": _header_value,
    "retry_after_ms": _milliseconds,
    "code": _header_value,
    "html200": _flag,
    "json200": _flag,
    "times": _count(0, 1_000_000),
    **dict.fromkeys(_AFTER, _count(0, 10_000_000)),
}
