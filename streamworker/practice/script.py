"""The model name is the script: it selects what the practice upstream does.

A model is a base name, followed by options as in a URL's query: `practice?deltas=50&pace_ms=20`. Values are
percent-decoded. An option that is unknown, repeated, out of range or in conflict with another is refused (400),
so that a misspelt fault is never taken for a healthy stream.

Content
    ==================== ============ ===================================================================
    option               default      meaning
    ==================== ============ ===================================================================
    deltas=N             20           content deltas per choice; if `text` is given, its number of words
    text=TEXT            counting     the words to send, one word, punctuation run or pair of ideographs per
                                      delta, repeated until there are `deltas` of them
    choices=N            request's n  number of choices; their deltas are interleaved
    reasoning[=N]        0 (bare: 3)  reasoning deltas before the content
    thoughts=TEXT        -            the words of the reasoning, one delta for each
    tool_calls[=N]       0 (bare: 1)  tool calls after the content; finish_reason "tool_calls"
    big_delta=N          -            the first content delta of each choice is N bytes of UTF-8
    finish=REASON        stop         the finish_reason; `none`: no choice ever finishes
    logprobs             -            logprobs beside every delta of content
    packed               -            the deltas of all choices in one chunk, the last choice first
    ==================== ============ ===================================================================

Shape. A shape is a preset of the options that follow it in this table; each of them can also be set separately.
    ==================== ============ ===================================================================
    shape=NAME           seed         provider of the chunks: seed openai azure vllm sglang llamacpp ollama tgi groq
                                      deepseek qwen kimi openrouter mistral together fireworks cerebras xai
                                      perplexity gemini anthropic litellm
    usage=WHERE          finish       `finish`: in the chunk with the last finish_reason, as the seed does;
                                      `own`: a last chunk with choices [], only if the request's
                                      stream_options.include_usage is true; `running`: a running total in
                                      every chunk; `choice`: in the choice; `x_groq`: in x_groq; `both`: in
                                      x_groq and in the chunk; `again`: in a chunk that repeats the finish;
                                      `none`: never
    content_as=HOW       text         `text`, `parts` (lists of parts and plain strings in turn), `refusal`,
                                      `audio`
    reasoning_as=HOW     reasoning_-  `reasoning_content`, `reasoning`, `both`, `details`
                         content      (reasoning_details), `parts` (thinking parts of the content)
    calls_as=HOW         fragments    `fragments`, `interleaved`, `whole`, `no_index`, `zero_index`, `no_type`,
                                      `empty_id`, `repeated`, `late_name`, `no_name`, `no_arguments`,
                                      `sparse`, `custom`, `function_call`
    keepalive=KIND       -            before every delta, and every ping_ms of first_delta_ms:
                                      `comment` `openrouter` `bare` `event` `data` `retry` `id` `json`
                                      `null` `object` `no_error` `blank`, or `all` in turn
    no_done              -            the stream ends without [DONE]
    ==================== ============ ===================================================================

Transport
    ==================== ============ ===================================================================
    format=F             seed         lines: `seed` LF LF, `unblanked` LF (no blank lines, as the seed page is
                                      printed), `crlf` CRLF CRLF, `cr` CR CR, `no_space` after the colon,
                                      `multiline` (JSON over several data lines), `bom` before the first
    done=HOW             plain        [DONE]: `plain`, with `blanks` around it, `no_space` before it,
                                      `no_newline` behind it, `named` by an event line, `junk` after it
    framing=F            chunked      `close`: Connection: close and no length, so that a cut looks like a
                                      clean end of the body; `length`: a content-length
    encoding=E           -            `gzip`, flushed after every write; `lie`: says gzip and is not
    chunk_bytes=N        -            the body goes out N bytes at a time, each its own HTTP chunk and write
    slow_headers_ms=N    0            delay before the response head
    first_delta_ms=N     0            delay between the head and the first chunk
    pace_ms=N            0            time from one delta to the next (role deltas are not paced)
    ping_ms=N            100          time from one keep-alive to the next
    ==================== ============ ===================================================================

Faults, at most one of them. `_after=N` counts all deltas except role deltas; 0 is immediately after the response
head, before any chunk.
    ======================== ============================================================================
    no_answer=HOW            instead of a response: `close` (FIN), `reset` (RST), `stall`, `half` a head,
                             `garbage` that is not HTTP
    break_after=N            the connection is reset (RST)
    close_after=N            the connection is closed (FIN) without the end of the body
    cut_after=N              like close_after, in the middle of the next delta and of its HTTP chunk
    cut_utf8_after=N         like close_after, in the middle of a multi-byte character of the next delta
    end_after=N              the body ends too early, but as HTTP requires
    stall_after=N            no further bytes; the connection stays open
    ping_stall_after=N       keep-alives (default: `comment`) every ping_ms, and no further delta
    garbage_after=N          an event that is not JSON, then the end of the body
    error_frame_after=N      an error, then the end of the body, no [DONE]
    error_then_done_after=N  an error, then [DONE]
    endless_line             a data line without an end after the role delta
    status=N                 an HTTP status, 201-599, and an error as its body
    error200                 status 200 and an error as application/json
    html200                  status 200 and a page of HTML
    json200                  status 200 and the whole completion as application/json
    ======================== ============================================================================

Details of faults
    ======================== ============================================================================
    error=SHAPE              the shape of an error: openai vllm vllm_flat sglang llamacpp llamacpp_field
                             openrouter groq event event_flat event_text tgi string xai litellm google
                             detail message anthropic stream html text empty (in a stream: an empty chunk,
                             as Ollama's)
    code=TEXT                the error's code; a number if the shape has one
    retry_after=VALUE        the header retry-after beside `status`, with any value
    retry_after_date=S       the same header with a date S seconds from now, negative for the past
    retry_after_ms=VALUE     the header retry-after-ms beside `status`
    should_retry=VALUE       the header x-should-retry beside `status`
    times=N                  only the first N calls with this model name fail
    ======================== ============================================================================

Without `stream: true` the answer is the whole completion as JSON; `no_answer`, `status`, `error200`, `html200`
and `slow_headers_ms` apply there too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qsl

from streamworker.practice.errors import ERRORS
from streamworker.practice.events import DONES, FORMATS, KEEPALIVES
from streamworker.practice.shapes import CALLS, CONTENTS, REASONINGS, SHAPES, USAGES, Shape
from streamworker.practice.values import count, flag, header_value, milliseconds, one_of, seconds

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_DELTAS: Final = 20


class ScriptError(ValueError):
    """A model name with invalid options; the message is meant for the caller."""


class Fault(StrEnum):
    """A fault of a stream after some deltas; the value is the name of the option."""

    BREAK = "break_after"
    CLOSE = "close_after"
    CUT = "cut_after"
    CUT_UTF8 = "cut_utf8_after"
    END = "end_after"
    STALL = "stall_after"
    PING_STALL = "ping_stall_after"
    GARBAGE = "garbage_after"
    ERROR_FRAME = "error_frame_after"
    ERROR_THEN_DONE = "error_then_done_after"


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A parsed model name. Fields have the names of the options; times are in milliseconds; None: as in the shape."""

    name: str
    deltas: int | None = None
    text: str | None = None
    choices: int | None = None
    reasoning: int = 0
    thoughts: str | None = None
    tool_calls: int = 0
    big_delta: int | None = None
    finish: str | None = None
    shape: str = "seed"
    usage: str | None = None
    content_as: str | None = None
    reasoning_as: str | None = None
    calls_as: str | None = None
    keepalive: str | None = None
    logprobs: bool = False
    packed: bool = False
    no_done: bool = False
    done: str = "plain"
    format: str = "seed"
    framing: str = "chunked"
    encoding: str | None = None
    chunk_bytes: int | None = None
    slow_headers_ms: float = 0
    first_delta_ms: float = 0
    pace_ms: float = 0
    no_answer: str | None = None
    fault: Fault | None = None
    after: int = 0
    ping_ms: float = 100
    endless_line: bool = False
    status: int | None = None
    retry_after: str | None = None
    retry_after_ms: str | None = None
    retry_after_date: float | None = None
    should_retry: str | None = None
    error200: bool = False
    html200: bool = False
    json200: bool = False
    error: str = "openai"
    code: str | None = None
    times: int | None = None

    @property
    def speaks(self) -> Shape:
        """The shape, with the options that were set separately."""
        return _speaks(
            self.shape, self.usage, self.content_as, self.reasoning_as, self.calls_as, self.keepalive
        )

    def well(self) -> Script:
        """Return the same script without its fault."""
        return replace(
            self,
            no_answer=None,
            fault=None,
            endless_line=False,
            status=None,
            error200=False,
            html200=False,
            json200=False,
        )


@lru_cache(maxsize=1000)  # called with every running total
def _speaks(
    shape: str,
    usage: str | None,
    content: str | None,
    reasoning: str | None,
    calls: str | None,
    keepalive: str | None,
) -> Shape:
    own: dict[str, Any] = {
        "usage": usage,
        "content": content,
        "reasoning": reasoning,
        "calls": calls,
        "keepalive": keepalive,
    }
    return SHAPES[shape]._replace(**{name: value for name, value in own.items() if value is not None})


def parse(model: str) -> Script:
    """Parse a model name. Raises ScriptError, which names every invalid option."""
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
        faults.append("only one fault is allowed: " + ", ".join(wrongs))
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
    if script.thoughts is not None and (script.reasoning or not script.thoughts):
        raise ScriptError(
            "option 'thoughts': must not be empty, and its words are counted without 'reasoning'"
        )
    headers = ("retry_after", "retry_after_ms", "retry_after_date", "should_retry")
    if script.status is None and any(getattr(script, name) is not None for name in headers):
        raise ScriptError(f"{', '.join(headers)} need status")
    if script.retry_after is not None and script.retry_after_date is not None:
        raise ScriptError("retry_after and retry_after_date are the same header")
    if script.code is not None and not _fails_in_words(script):
        raise ScriptError("code needs status, error200, error_frame_after or error_then_done_after")
    if script.framing == "length" and (script.encoding or script.speaks.keepalive):
        raise ScriptError("framing=length cannot be combined with encoding or keepalive")
    return script


def _fails_in_words(script: Script) -> bool:
    spoken = script.fault in {Fault.ERROR_FRAME, Fault.ERROR_THEN_DONE}
    return script.status is not None or script.error200 or spoken


_AFTER: Final = frozenset(fault.value for fault in Fault)
_WRONGS: Final = _AFTER | {"no_answer", "endless_line", "status", "error200", "html200", "json200"}
NO_ANSWERS: Final = ("close", "reset", "stall", "half", "garbage")
_OPTIONS: Final[dict[str, Callable[[str], object]]] = {
    "deltas": count(0, 10_000_000),
    "text": str,
    "choices": count(1, 128),
    "reasoning": count(0, 1_000_000, bare=3),
    "thoughts": str,
    "tool_calls": count(0, 1_000, bare=1),
    "big_delta": count(1, 256 * 1024 * 1024),
    "finish": header_value,
    "shape": one_of(*SHAPES),
    "usage": one_of(*USAGES),
    "content_as": one_of(*CONTENTS),
    "reasoning_as": one_of(*REASONINGS),
    "calls_as": one_of(*CALLS),
    "keepalive": one_of(*KEEPALIVES, "all"),
    "logprobs": flag,
    "packed": flag,
    "no_done": flag,
    "done": one_of(*DONES),
    "format": one_of(*FORMATS),
    "framing": one_of("chunked", "close", "length"),
    "encoding": one_of("gzip", "lie"),
    "chunk_bytes": count(1, 1024 * 1024),
    "slow_headers_ms": milliseconds,
    "first_delta_ms": milliseconds,
    "pace_ms": milliseconds,
    "ping_ms": milliseconds,
    "no_answer": one_of(*NO_ANSWERS),
    "endless_line": flag,
    "status": count(201, 599),
    "retry_after": header_value,
    "retry_after_ms": header_value,
    "retry_after_date": seconds,
    "should_retry": header_value,
    "error200": flag,
    "html200": flag,
    "json200": flag,
    "error": one_of(*ERRORS),
    "code": header_value,
    "times": count(0, 1_000_000),
    **dict.fromkeys(_AFTER, count(0, 10_000_000)),
}
