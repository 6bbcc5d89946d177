"""A table of how each provider writes its chunks. The defaults are those of the seed page."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

USAGES: Final = ("finish", "own", "running", "choice", "x_groq", "both", "again", "none")
CONTENTS: Final = ("text", "parts", "refusal", "audio")
REASONINGS: Final = ("reasoning_content", "reasoning", "both", "details", "parts")
CALLS: Final = (
    "fragments",
    "interleaved",
    "whole",
    "no_index",
    "zero_index",
    "no_type",
    "empty_id",
    "repeated",
    "late_name",
    "no_name",
    "no_arguments",
    "sparse",
    "custom",
    "function_call",
)
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})
ROLE: Final[Mapping[str, Any]] = MappingProxyType({"role": "assistant"})


class Shape(NamedTuple):
    """The chunks of one provider. Fields that are mappings are added to the objects that they are named after.

    `id`: the `same` in every chunk, a new one in `each`, or `empty`. `role`: in a separate `first` delta, or in `each`.
    `ends`: the finish reason is in the `last` delta, or in its `own`. `hidden_tokens` are counted only in the total.
    `opening` and `closing` are whole chunks before the first delta and after the last finish reason.
    """

    id: str = "same"
    object: str | None = "chat.completion.chunk"
    last_object: str | None = None
    chunk: Mapping[str, Any] = NOTHING
    choice: Mapping[str, Any] = NOTHING
    delta: Mapping[str, Any] = NOTHING
    first_delta: Mapping[str, Any] = ROLE
    role: str = "first"
    has_index: bool = True
    ends: str = "last"
    last_delta: Mapping[str, Any] = NOTHING
    last_choice: Mapping[str, Any] = NOTHING
    last_chunk: Mapping[str, Any] = NOTHING
    repeats_text: bool = False
    padding: bool = False
    content: str = "text"
    reasoning: str = "reasoning_content"
    calls: str = "fragments"
    calls_finish: str = "tool_calls"
    usage: str = "finish"
    has_total: bool = True
    null_usage: bool = False
    hidden_tokens: int = 0
    usage_members: Mapping[str, Any] = NOTHING
    opening: tuple[Mapping[str, Any], ...] = ()
    closing: tuple[Mapping[str, Any], ...] = ()
    keepalive: str | None = None
    done: bool = True


_NULLS: Final = {"finish_reason": None, "logprobs": None}
_CREATED: Final = {"created": 1700000000}
_EMPTY_ROLE: Final = {"role": "assistant", "content": ""}
_NULL_ROLE: Final = {"role": "assistant", "content": None}
_NOT_MODERATED: Final = {"type": "error", "code": "practice", "message": "not moderated"}
_NO_MODERATION: Final = {"input": _NOT_MODERATED, "output": _NOT_MODERATED}
_SAFE: Final = {"hate": {"filtered": False, "severity": "safe"}}

SHAPES: Final[dict[str, Shape]] = {
    # Its printed sample has no `created`; the usage of the finish chunk has no total.
    "seed": Shape(has_total=False),
    "openai": Shape(
        chunk=_CREATED | {"service_tier": "default", "system_fingerprint": "fp_practice"},
        choice=_NULLS,
        first_delta=_EMPTY_ROLE | {"refusal": None},
        ends="own",
        padding=True,
        usage="own",
        null_usage=True,
        usage_members={"prompt_tokens_details": {"cached_tokens": 0}, "completion_tokens_details": None},
        closing=({"id": "modr_practice", "choices": [], "moderation": _NO_MODERATION},),
    ),
    # Content filter results come before the first delta, with every delta, and after the end in a chunk without a delta.
    "azure": Shape(
        chunk=_CREATED | {"system_fingerprint": "fp_practice"},
        choice=_NULLS | {"content_filter_results": _SAFE},
        first_delta=_EMPTY_ROLE | {"refusal": None},
        ends="own",
        usage="own",
        null_usage=True,
        opening=(
            {
                "id": "",
                "object": "",
                "created": 0,
                "model": "",
                "choices": [],
                "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": _SAFE}],
            },
        ),
        closing=(
            {
                "id": "",
                "object": "",
                "created": 0,
                "model": "",
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": None,
                        "content_filter_results": _SAFE,
                        "content_filter_offsets": {"check_offset": 44, "start_offset": 44, "end_offset": 199},
                    }
                ],
            },
        ),
    ),
    "vllm": Shape(
        chunk=_CREATED,
        choice=_NULLS,
        first_delta=_EMPTY_ROLE,
        last_choice={"stop_reason": None},
        reasoning="reasoning",
        calls="no_arguments",
        usage="own",
    ),
    "sglang": Shape(
        chunk=_CREATED,
        choice=_NULLS | {"matched_stop": None},
        delta={"role": None, "content": None, "reasoning_content": None, "tool_calls": None},
        first_delta=_EMPTY_ROLE,
        ends="own",
        last_choice={"matched_stop": 2},
        usage="own",
        null_usage=True,
        usage_members={"reasoning_tokens": 0},
    ),
    "llamacpp": Shape(
        chunk=_CREATED | {"system_fingerprint": "b1-practice"},
        choice={"finish_reason": None},
        first_delta=_NULL_ROLE,
        ends="own",
        last_chunk={"timings": {"predicted_n": 1, "predicted_ms": 0.5}},
        usage="own",
        keepalive="bare",
    ),
    "ollama": Shape(
        chunk=_CREATED | {"system_fingerprint": "fp_ollama"},
        choice={"finish_reason": None},
        role="each",
        first_delta=_EMPTY_ROLE,
        ends="own",
        last_delta=_EMPTY_ROLE,
        reasoning="reasoning",
        calls="whole",
        usage="own",
    ),
    "tgi": Shape(
        id="empty",
        chunk=_CREATED | {"system_fingerprint": "3-practice"},
        choice=_NULLS,
        role="each",
        calls="repeated",
        calls_finish="stop",
        usage="own",
    ),
    "groq": Shape(
        id="each",
        chunk=_CREATED | {"system_fingerprint": "fp_practice"},
        choice=_NULLS,
        first_delta=_EMPTY_ROLE,
        ends="own",
        reasoning="reasoning",
        calls="whole",
        usage="both",
        usage_members={"queue_time": 0.01, "total_time": 0.2},
    ),
    "deepseek": Shape(
        chunk=_CREATED | {"system_fingerprint": "fp_practice"},
        choice=_NULLS,
        first_delta=_NULL_ROLE | {"reasoning_content": ""},
        ends="own",
        last_delta={"content": "", "reasoning_content": None},
        null_usage=True,
        usage_members={"prompt_cache_hit_tokens": 0},
        keepalive="comment",
    ),
    "qwen": Shape(
        id="empty", chunk=_CREATED, first_delta=_NULL_ROLE, ends="own", calls="empty_id", usage="own"
    ),
    # The older format: usage is in the choice, and there is no `object`.
    "kimi": Shape(object=None, choice={"finish_reason": None}, first_delta=_EMPTY_ROLE, usage="choice"),
    "openrouter": Shape(
        chunk=_CREATED | {"provider": "Practice"},
        choice=_NULLS | {"native_finish_reason": None},
        role="each",
        first_delta=_EMPTY_ROLE,
        ends="own",
        last_delta=_EMPTY_ROLE,
        last_choice={"native_finish_reason": "end_turn"},
        reasoning="details",
        usage="again",
        usage_members={"cost": 0.00014},
        keepalive="openrouter",
    ),
    "mistral": Shape(
        chunk=_CREATED,
        choice={"finish_reason": None},
        first_delta=_EMPTY_ROLE,
        content="parts",
        reasoning="parts",
        calls="no_index",
    ),
    "together": Shape(
        chunk=_CREATED,
        choice=_NULLS | {"seed": 4},
        role="each",
        repeats_text=True,
        usage_members={"cached_tokens": 0},
    ),
    "fireworks": Shape(
        chunk=_CREATED,
        choice={"finish_reason": None},
        ends="own",
        last_chunk={"perf_metrics": {"prompt-tokens": 5}},
    ),
    "cerebras": Shape(
        chunk=_CREATED,
        ends="own",
        last_chunk={"time_info": {"queue_time": 0.001, "total_time": 0.02}},
        reasoning="reasoning",
        calls="whole",
    ),
    "xai": Shape(id="each", chunk=_CREATED, calls="whole", usage="own", hidden_tokens=340),
    "perplexity": Shape(
        last_object="chat.completion.done",
        chunk=_CREATED | {"citations": ["https://example.com/"], "search_results": []},
        choice={"finish_reason": None},
        role="each",
        usage="running",
        usage_members={"search_context_size": "low"},
    ),
    "gemini": Shape(chunk=_CREATED, has_index=False, role="each", calls="zero_index", calls_finish="stop"),
    "anthropic": Shape(
        chunk={"created": 0, "system_fingerprint": None, "service_tier": None},
        choice=_NULLS,
        first_delta=_EMPTY_ROLE,
        ends="own",
        usage="own",
    ),
    "litellm": Shape(
        chunk=_CREATED | {"system_fingerprint": None},
        choice=_NULLS,
        reasoning="both",
        ends="own",
        usage="own",
        done=False,
    ),
}
