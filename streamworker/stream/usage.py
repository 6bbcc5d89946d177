"""The usage ledger: what the upstream reported, what was seen to pass, and what follows from both.

Reports are never added up (many upstreams send running totals), never erased by a later null, and never invented:
what is unknown stays out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from streamworker.model import Observed, UsageSource

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BYTES_PER_TOKEN", "ESTIMATE_METHOD", "Ledger", "Tokenizer", "generated_text"]

BYTES_PER_TOKEN = 4
"""About what byte-pair vocabularies of today reach on mixed text. An estimate is always named as one."""

ESTIMATE_METHOD = (
    f"utf8_bytes/{BYTES_PER_TOKEN} of the generated text that was received; the prompt is not counted"
)
_METHOD_OF_TOKENIZER = "{} tokens of the generated text that was received; the prompt is not counted"
_MOST_TOKENS = 1 << 40
"""A count beyond it is none: an upstream may report any number, and JSON has no largest one."""

_COUNTED_AT_ONCE = 1 << 16
"""Characters that are kept to be counted as one; a cut costs a token at most."""


class Tokenizer(NamedTuple):
    """Counts the tokens of a text; `name` is that of its vocabulary."""

    name: str
    count: Callable[[str], int]


class Ledger:
    """Counts of one attempt. Attributes are the contract's `observed` members."""

    __slots__ = (
        "_final",
        "_generated_bytes",
        "_report",
        "_text",
        "_text_chars",
        "_tokenizer",
        "_tokens",
        "bytes",
        "chunks",
        "content_chars",
        "deltas",
        "reasoning_chars",
    )

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self._tokenizer = tokenizer
        self._text: list[str] = []
        self._text_chars = 0
        self._tokens = 0
        self.deltas = 0
        self.chunks = 0
        self.content_chars = 0
        self.reasoning_chars = 0
        self.bytes = 0
        self._generated_bytes = 0
        self._report: dict[str, Any] | None = None
        self._final = False

    def begin_try(self) -> None:
        """A new call begins: what an earlier one reported is not its usage."""
        self._report = None
        self._final = False

    def report(self, usage: dict[str, Any], *, final: bool) -> None:
        """Note what the upstream reports. `final`: nothing was still being generated when it did."""
        self._report = usage
        self._final = final

    def count_delta(self, delta: dict[str, Any]) -> None:
        """Count one choice delta and the text in it."""
        self.deltas += 1
        content = delta.get("content")
        if type(content) is str and len(delta) == 1:  # what nearly every delta is
            self.content_chars += len(content)
            self._generated_bytes += (
                len(content) if content.isascii() else len(content.encode("utf-8", "replace"))
            )
            if self._tokenizer is not None:
                self._keep(content)
            return
        text, reasoning, rest = generated_text(delta)
        self.content_chars += len(text)
        self.reasoning_chars += len(reasoning)
        self._generated_bytes += sum(len(part.encode("utf-8", "replace")) for part in (text, reasoning, rest))
        if self._tokenizer is not None:
            self._keep(text + reasoning + rest)

    @property
    def observed(self) -> Observed:
        """The contract's `observed`."""
        return Observed(self.deltas, self.chunks, self.content_chars, self.reasoning_chars, self.bytes)

    def settle(self, *, completed: bool) -> tuple[dict[str, Any] | None, UsageSource, str | None]:
        """Close the account: usage, its source, and the method where it is an estimate."""
        if self._report is not None:
            whole = completed or self._final
            return self._report, UsageSource.UPSTREAM if whole else UsageSource.UPSTREAM_PARTIAL, None
        if self._generated_bytes:
            tokens, method = self._estimate()
            return {"completion_tokens": tokens}, UsageSource.ESTIMATED, method
        return None, UsageSource.NONE, None

    def reported(self, *, completed: bool) -> dict[str, Any] | None:
        """Return the upstream's report of the whole try; None if there is none, or a running total at most."""
        return self._report if completed or self._final else None

    @property
    def total_tokens(self) -> int | None:
        """What the whole call came to, as reported; None if it was not."""
        total = _count(self._report, "total_tokens")
        if total is not None:
            return total
        prompt, completion = _count(self._report, "prompt_tokens"), self.completion_tokens
        return None if prompt is None or completion is None else prompt + completion

    @property
    def completion_tokens(self) -> int | None:
        """What was generated, as reported; None if it was not."""
        return _count(self._report, "completion_tokens")

    def _estimate(self) -> tuple[int, str]:
        if self._tokenizer is None:
            return -(-self._generated_bytes // BYTES_PER_TOKEN), ESTIMATE_METHOD
        self._count_kept(self._tokenizer)
        return self._tokens, _METHOD_OF_TOKENIZER.format(self._tokenizer.name)

    def _keep(self, text: str) -> None:
        """Keep generated text until it is known whether the upstream reports its usage, and no more than a bound."""
        self._text.append(text)
        self._text_chars += len(text)
        if self._text_chars >= _COUNTED_AT_ONCE and self._tokenizer is not None:
            self._count_kept(self._tokenizer)

    def _count_kept(self, tokenizer: Tokenizer) -> None:
        self._tokens += tokenizer.count("".join(self._text))
        self._text.clear()
        self._text_chars = 0


def generated_text(delta: dict[str, Any]) -> tuple[str, str, str]:
    """Split what a delta generated into content, reasoning, and the rest (refusals, calls).

    Some gateways send the same reasoning under two names, so one is taken (wire facts §5); Mistral puts it in parts of
    `content`.
    """
    content, thinking = _content(delta.get("content"))
    return content, thinking + _reasoning(delta), _rest(delta)


def _content(content: Any) -> tuple[str, str]:
    if isinstance(content, str):
        return content, ""
    text = thinking = ""
    for part in _objects(content):
        text += _string(part.get("text"))
        thought = part.get("thinking")
        thinking += _string(thought) + "".join(_string(piece.get("text")) for piece in _objects(thought))
    return text, thinking


def _reasoning(delta: dict[str, Any]) -> str:
    for name in ("reasoning_content", "reasoning"):
        if isinstance(reasoning := delta.get(name), str):
            return reasoning
    details = _objects(delta.get("reasoning_details"))
    return "".join(_string(detail.get("text")) or _string(detail.get("summary")) for detail in details)


def _rest(delta: dict[str, Any]) -> str:
    calls = [call.get(kind) for call in _objects(delta.get("tool_calls")) for kind in ("function", "custom")]
    calls.append(delta.get("function_call"))
    parts = (
        call.get(name) for call in calls if isinstance(call, dict) for name in ("name", "arguments", "input")
    )
    return _string(delta.get("refusal")) + "".join(map(_string, parts))


def _count(report: dict[str, Any] | None, name: str) -> int | None:
    value = None if report is None else report.get(name)
    return value if type(value) is int and 0 <= value <= _MOST_TOKENS else None


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""
