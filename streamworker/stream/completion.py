"""The assembler: a job's delta events in, one OpenAI `chat.completion` out.

It is fed in one of two ways, and gives the same result in both: by the worker, with the members of each delta event as
it is published (`start`, `add`, `end`), or by a reader of the events topic, with decoded events of the job's valid
attempt (`read`). `docs/completion.md` states the rules for every member of the result.

Memory is bounded. Values are kept encoded, and once their size passes the limit, first the log probabilities are
dropped and then everything. That size is a lower bound of the result's: the code that writes the result compares the
result's size with the limit and calls `omit_next` until the result fits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamworker.stream.members import Members, append_text, clean, load
from streamworker.stream.message import CHOICE_BYTES, Choice
from streamworker.wire.json import replace_surrogates

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.stream.members import Load

__all__ = ["MEMBERS_OF_THE_CHUNK", "CompletionAssembler", "second_of"]

_LOGPROBS, _COMPLETION = "logprobs", "completion"
_MAX_CREATED = 1 << 53  # the integers that every JSON reader keeps
_REPORTED = frozenset({"upstream", "upstream_partial"})
_ASSEMBLED = frozenset({"id", "object", "created", "model", "choices", "usage"})
MEMBERS_OF_THE_CHUNK = frozenset(
    {
        "__verbose",
        "citations",
        "images",
        "kv_transfer_params",
        "metrics",
        "moderation",
        "perf_metrics",
        "prompt_annotations",
        "prompt_filter_results",
        "prompt_logprobs",
        "prompt_progress",
        "prompt_token_ids",
        "provider",
        "related_questions",
        "search_results",
        "streamworker",
        "time_info",
        "timings",
        "x_groq",
    }
)
"""Members that upstreams put on the chunk. An event's `extra` does not say whether a member came with the chunk or with
the choice, so any other member of an event with a choice is taken to be the choice's."""


class CompletionAssembler:
    """Gathers one attempt's completion. `limit_bytes` bounds the kept values, and is the size of the largest result."""

    __slots__ = (
        "_attempt",
        "_choices",
        "_contents",
        "_created",
        "_extra",
        "_finish_reasons",
        "_id",
        "_limit",
        "_logprob_bytes",
        "_model",
        "_omitted",
        "_size",
        "_started_model",
        "_started_s",
        "_usage",
    )

    def __init__(self, *, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._size = 0
        self._logprob_bytes = 0  # of the size
        self.start(attempt="", model="", started_ms=0)

    @property
    def omitted(self) -> list[str]:
        """The parts that were left out for their size: `logprobs`, then `completion`."""
        return list(self._omitted)

    def start(self, *, attempt: str, model: str, started_ms: int) -> None:
        """Begin an attempt and forget the one before it. `model` is the job's, `started_ms` the `ts` of `started`."""
        self._attempt = clean(attempt)
        self._started_model = clean(model)
        self._started_s = started_ms // 1000
        self._omitted: tuple[str, ...] = ()
        self._finish_reasons: Mapping[str, Any] | None = None
        self._usage: dict[str, Any] | None = None
        self._forget()

    def add(
        self,
        choice: int | None,
        delta: dict[str, Any],
        finish_reason: str | None = None,
        logprobs: Any = None,
        chunk: Any = None,
        extra: Any = None,
    ) -> None:
        """Add the members of one delta event, in the order of `seq`. None and `msgspec.UNSET` are the same."""
        # Nearly every delta is one string of content: 0.2 us here, five times as much in `_add`.
        if finish_reason is None and not (logprobs or chunk or extra) and type(choice) is int:
            content = self._contents.get(choice)
            if content is not None and type(delta) is dict and len(delta) == 1:
                text = delta.get("content")
                if type(text) is str:
                    try:
                        encoded = text.encode()
                    except UnicodeEncodeError:
                        self._size += append_text(content, text)
                    else:
                        content += encoded
                        self._size += len(encoded)
                    if self._size > self._limit:
                        self._fit()
                    return
        if _COMPLETION not in self._omitted:
            self._add(choice, delta, finish_reason, logprobs, chunk, extra)
            self._fit()

    def end(self, *, finish_reasons: Mapping[str, Any], usage: Any, usage_source: str) -> None:
        """Take these members of the terminal event."""
        self._finish_reasons = finish_reasons
        is_reported = type(usage) is dict and usage_source in _REPORTED
        self._usage = replace_surrogates(usage) if is_reported else None

    def read(self, event: Mapping[str, Any]) -> None:
        """Take one decoded event. A `started` begins anew; the caller leaves out events of void attempts."""
        match event.get("type"):
            case "delta":
                delta = event.get("delta")
                self.add(
                    event.get("choice"),
                    delta if type(delta) is dict else {},
                    event.get("finish_reason"),
                    event.get("logprobs"),
                    event.get("chunk"),
                    event.get("extra"),
                )
            case "started":
                attempt, model, started_ms = (event.get(name) for name in ("attempt", "model", "ts"))
                self.start(
                    attempt=attempt if type(attempt) is str else "",
                    model=model if type(model) is str else "",
                    started_ms=started_ms if type(started_ms) is int else 0,
                )
            case "usage":
                reasons, source = event.get("finish_reasons"), event.get("usage_source")
                self.end(
                    finish_reasons=reasons if type(reasons) is dict else {},
                    usage=event.get("usage"),
                    usage_source=source if type(source) is str else "",
                )

    def omit_next(self) -> bool:
        """Leave out the next part of the result; return whether there was one."""
        return bool(self._choices) and self._omit_next()

    def completion(self, load: Load = load) -> dict[str, Any] | None:
        """Return the completion as far as it came; None if there was no delta or it is omitted.

        With `load=msgspec.Raw`, values that are kept as encoded JSON are not decoded: for a caller that encodes the
        result. The assembler goes on: more deltas may be added.
        """
        if not self._choices:
            return None
        completion = {
            "id": self._id or f"chatcmpl-{self._attempt}",
            "object": "chat.completion",
            "created": self._created or self._started_s,
            "model": self._model or self._started_model,
            "choices": [
                choice.value(index, self._finish_reason(index, choice), load)
                for index, choice in sorted(self._choices.items())
            ],
            "usage": _with_total(self._usage),
        }
        return completion | self._extra.values(load)

    def _forget(self) -> None:
        self._choices: dict[int, Choice] = {}
        self._contents: dict[int, bytearray] = {}
        self._extra = Members()
        self._id = self._model = ""
        self._created = 0
        self._size = 0
        self._logprob_bytes = 0

    def _fit(self) -> None:
        while self._size > self._limit and self._omit_next():
            pass

    def _omit_next(self) -> bool:
        if _COMPLETION in self._omitted:
            return False
        if self._logprob_bytes:
            self._omitted = (_LOGPROBS,)
            self._size -= self._logprob_bytes
            self._logprob_bytes = 0
            for choice in self._choices.values():
                choice.drop_logprobs()
        else:
            self._omitted = (*self._omitted, _COMPLETION)
            self._forget()
        return True

    def _add(self, index: Any, delta: Any, finish_reason: Any, logprobs: Any, chunk: Any, extra: Any) -> None:
        if type(chunk) is dict:
            self._add_chunk(chunk)
        choice = self._choice(index) if type(index) is int else None
        if type(extra) is dict:
            self._add_extra(extra, choice)
        if choice is None:
            return
        if type(finish_reason) is str and finish_reason:
            choice.finish_reason = clean(finish_reason)
        if type(delta) is dict:
            self._size += choice.add(delta)
        if choice.content is not None:
            self._contents[index] = choice.content
        if _LOGPROBS not in self._omitted:
            grown = choice.add_logprobs(logprobs)
            self._logprob_bytes += grown
            self._size += grown

    def _choice(self, index: int) -> Choice:
        choice = self._choices.get(index)
        if choice is None:
            choice = self._choices[index] = Choice()
            self._size += CHOICE_BYTES
        return choice

    def _add_chunk(self, chunk: dict[str, Any]) -> None:
        identifier, model, created = chunk.get("id"), chunk.get("model"), chunk.get("created")
        if not self._id and type(identifier) is str:
            self._id = clean(identifier)
            self._size += len(identifier)
        if not self._model and type(model) is str:
            self._model = clean(model)
            self._size += len(model)
        self._created = self._created or second_of(created)
        for name in ("system_fingerprint", "service_tier"):
            self._size += self._extra.set(name, chunk.get(name))

    def _add_extra(self, extra: dict[str, Any], choice: Choice | None) -> None:
        for name, value in extra.items():
            if choice is not None and name not in MEMBERS_OF_THE_CHUNK:
                self._size += choice.add_extra(name, value)
            elif name not in _ASSEMBLED:
                self._size += self._extra.set(name, value)

    def _finish_reason(self, index: int, choice: Choice) -> str | None:
        if self._finish_reasons is None:
            return choice.finish_reason
        reason = self._finish_reasons.get(str(index))
        return clean(reason) if type(reason) is str else None


def second_of(created: Any) -> int:
    """Read a `created`; 0 if it is not a positive number."""
    is_number = type(created) is int or type(created) is float
    return int(created) if is_number and 1 <= created < _MAX_CREATED else 0


def _with_total(usage: dict[str, Any] | None) -> dict[str, Any] | None:
    """Add `total_tokens` to a report that lacks it and has both summands."""
    if usage is None or usage.get("total_tokens") is not None:
        return usage
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return usage
    return usage | {"total_tokens": prompt + completion}
