"""Usage of one attempt: what the upstream reported, what was received, and the terminal event's `usage`.

Reports are never added up, because many upstreams send running totals. A later null does not erase a report.
Unknown counts stay unknown.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from streamworker.model import Observed, UsageSource
from streamworker.text import BYTES_PER_TOKEN
from streamworker.wire.json import as_count

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ESTIMATE_METHOD", "Ledger", "Tokenizer", "VoidedUsage", "generated_text"]

ESTIMATE_METHOD = (
    f"utf8_bytes/{BYTES_PER_TOKEN} of the generated text that was received; the prompt is not counted"
)
_METHOD_OF_TOKENIZER = "{} tokens of the generated text that was received; the prompt is not counted"
_NO_CONTENT = frozenset({"role", "id", "index", "name", "type", "object"})
"""Members of a delta that are not generated content."""

_MAX_BUFFERED_BYTES = 1 << 16
"""Bytes of text that are buffered and counted together. Each cut adds at most one token."""


class Tokenizer(NamedTuple):
    """Counts the tokens of a text. `name` is the name of its vocabulary."""

    name: str
    count: Callable[[str], int]


_MAX_DETAILS_DEPTH = 2
"""Levels of objects inside a report whose counts are added up."""


class VoidedUsage:
    """The reports of calls whose output is void: failed tries, and the last calls of attempts that were restarted."""

    __slots__ = ("calls", "usage")

    def __init__(self) -> None:
        self.calls = 0
        self.usage: dict[str, Any] = {}

    def add(self, report: dict[str, Any] | None) -> None:
        """Add a call's report, member by member; None is a call without a report."""
        if report is not None:
            self.calls += 1
            self.usage = _sum(self.usage, report)


class Ledger:
    """Counts what one attempt received; its public attributes are the members of the terminal event's
    `observed`."""

    __slots__ = (
        "_final",
        "_generated_bytes",
        "_other_deltas",
        "_report",
        "_text",
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
        self._text = bytearray()  # a list of short strings takes three times the memory
        self._tokens = 0
        self.deltas = 0
        self.chunks = 0
        self.content_chars = 0
        self.reasoning_chars = 0
        self.bytes = 0
        self._generated_bytes = 0
        self._other_deltas = 0
        self._report: dict[str, Any] | None = None
        self._final = False

    def begin_try(self) -> None:
        """Forget the report of the previous call."""
        self._report = None
        self._final = False

    def report(self, usage: dict[str, Any], *, final: bool) -> None:
        """Store the upstream's report. `final` means that no choice was unfinished at that time.

        A report without any positive count is ignored: some upstreams send zeros until the last report.
        """
        if _has_counts(usage):
            self._report = usage
            self._final = final

    def count_delta(self, delta: dict[str, Any]) -> None:
        """Count one choice delta and its text."""
        self.deltas += 1
        content = delta.get("content")
        if type(content) is str and len(delta) == 1:  # as in nearly every delta
            self.content_chars += len(content)
            utf8 = content.encode("utf-8", "replace")
            self._generated_bytes += len(utf8)
            if self._tokenizer is not None:
                self.keep(utf8)
            return
        text, reasoning, rest = generated_text(delta)
        if not (text or reasoning or rest) and _has_other_content(delta):
            self._other_deltas += 1
        self.content_chars += len(text)
        self.reasoning_chars += len(reasoning)
        self._generated_bytes += sum(len(part.encode("utf-8", "replace")) for part in (text, reasoning, rest))
        if self._tokenizer is not None:
            self.keep((text + reasoning + rest).encode("utf-8", "replace"))

    def count_texts(self, count: int, chars: int, *, size: int, utf8: int, is_reasoning: bool) -> None:
        """Count chunks whose deltas are one text each, of `chars` characters and `utf8` bytes in all, in reads of `size` bytes.

        If `keeps_text`, the caller gives the texts to `keep`.
        """
        self.chunks += count
        self.deltas += count
        self.bytes += size
        if is_reasoning:
            self.reasoning_chars += chars
        else:
            self.content_chars += chars
        self._generated_bytes += utf8

    @property
    def keeps_text(self) -> bool:
        """Whether the generated text is buffered to be counted by a tokenizer."""
        return self._tokenizer is not None

    def keep(self, text: bytes) -> None:
        """Buffer generated text until it is known whether the upstream reports its usage. The buffer is bounded."""
        self._text += text
        if len(self._text) >= _MAX_BUFFERED_BYTES and self._tokenizer is not None:
            self._count_kept(self._tokenizer)

    @property
    def observed(self) -> Observed:
        """The terminal event's `observed`."""
        return Observed(self.deltas, self.chunks, self.content_chars, self.reasoning_chars, self.bytes)

    def settle(self, *, completed: bool) -> tuple[dict[str, Any] | None, UsageSource, str | None]:
        """Return the terminal event's usage, its source, and the method if it is an estimate."""
        has_generated = bool(self._generated_bytes or self._other_deltas)
        if self._report is not None and not (has_generated and self._report.get("completion_tokens") == 0):
            whole = completed or self._final
            return self._report, UsageSource.UPSTREAM if whole else UsageSource.UPSTREAM_PARTIAL, None
        if has_generated:
            tokens, method = self._estimate()
            return {"completion_tokens": tokens}, UsageSource.ESTIMATED, method
        return None, UsageSource.NONE, None

    @property
    def report_of_call(self) -> dict[str, Any] | None:
        """The latest report of the call, also a running total; None if it sent none."""
        return self._report

    def reported(self, *, completed: bool) -> dict[str, Any] | None:
        """Return the upstream's report if it covers the whole try; None if there is none or only a running
        total."""
        return self._report if completed or self._final else None

    @property
    def total_tokens(self) -> int | None:
        """Tokens of the whole call as reported, or None."""
        total = _count(self._report, "total_tokens")
        if total is not None:
            return total
        prompt, completion = _count(self._report, "prompt_tokens"), self.completion_tokens
        return None if prompt is None or completion is None else prompt + completion

    @property
    def completion_tokens(self) -> int | None:
        """Generated tokens as reported, or None."""
        return _count(self._report, "completion_tokens")

    def _estimate(self) -> tuple[int, str]:
        if self._tokenizer is None:
            tokens, method = -(-self._generated_bytes // BYTES_PER_TOKEN), ESTIMATE_METHOD
        else:
            self._count_kept(self._tokenizer)
            tokens, method = self._tokens, _METHOD_OF_TOKENIZER.format(self._tokenizer.name)
        if self._other_deltas:
            method += f"; {self._other_deltas} delta(s) with other content count as one token each"
        return tokens + self._other_deltas, method

    def _count_kept(self, tokenizer: Tokenizer) -> None:
        self._tokens += tokenizer.count(self._text.decode())
        self._text.clear()


def _has_counts(usage: dict[str, Any]) -> bool:
    """Whether a usage report has a positive number, itself or in one of its details."""
    return any(
        _has_counts(value) if isinstance(value, dict) else type(value) in {int, float} and value > 0
        for value in usage.values()
    )


def _has_other_content(delta: dict[str, Any]) -> bool:
    """Whether a delta without text generated something else, such as an image or audio."""
    return any(value not in (None, "", [], {}) for name, value in delta.items() if name not in _NO_CONTENT)


def generated_text(delta: dict[str, Any]) -> tuple[str, str, str]:
    """Split the generated text of a delta into content, reasoning, and the rest (refusals, calls).

    Some gateways send the same reasoning under two names, so only one is counted. Mistral sends reasoning as
    parts of `content`.
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
        if isinstance(reasoning := delta.get(name), str) and reasoning:
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
    return None if report is None else as_count(report.get(name))


def _objects(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _sum(total: dict[str, Any], report: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    """Add the counts of a report to a total. Members that are not counts are left out."""
    result = dict(total)
    for name, value in report.items():
        if isinstance(value, dict) and depth < _MAX_DETAILS_DEPTH:
            known = result.get(name)
            result[name] = _sum(known if isinstance(known, dict) else {}, value, depth + 1)
        elif (count := as_count(value)) is not None:
            known = result.get(name)
            result[name] = count + (known if type(known) is int else 0)
    return result
