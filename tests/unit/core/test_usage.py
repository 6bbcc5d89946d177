"""The usage ledger: reported, seen, and what follows from both."""

from __future__ import annotations

from typing import Any

import pytest

from streamworker.core.usage import ESTIMATE_METHOD, Ledger, generated_text
from streamworker.model import Observed, UsageSource


@pytest.mark.parametrize(
    ("delta", "text", "reasoning", "rest"),
    [
        ({"content": "a"}, "a", "", ""),
        ({"content": None}, "", "", ""),
        ({"content": 5, "reasoning": 5, "tool_calls": 5, "refusal": 5, "function_call": 5}, "", "", ""),
        ({"content": "a", "reasoning_content": "b"}, "a", "b", ""),
        ({"reasoning": "b"}, "", "b", ""),
        ({"reasoning_content": "b", "reasoning": "b"}, "", "b", ""),
        ({"reasoning_content": None, "reasoning": "b"}, "", "b", ""),
        ({"reasoning": "b", "reasoning_details": [{"text": "b"}]}, "", "b", ""),
        ({"reasoning_details": [{"text": "b"}, {"summary": "c"}, {"data": "x"}, 5]}, "", "bc", ""),
        ({"content": [{"type": "text", "text": "a"}, "x", None]}, "a", "", ""),
        ({"content": [{"type": "thinking", "thinking": [{"text": "b"}, {"text": 1}]}]}, "", "b", ""),
        ({"content": [{"type": "thinking", "thinking": "b"}, {"text": "a"}]}, "a", "b", ""),
        ({"refusal": "no"}, "", "", "no"),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}, {"custom": {"input": "i"}}]},
            "",
            "",
            "f{}i",
        ),
        ({"tool_calls": [None, {"function": None}, {"id": "1"}]}, "", "", ""),
        ({"function_call": {"name": "f", "arguments": "{}"}}, "", "", "f{}"),
    ],
)
def test_generated_text_of_any_delta_is_split_and_never_doubled(
    delta: dict[str, Any], text: str, reasoning: str, rest: str
) -> None:
    """Reasoning that comes under two names is counted once; calls and refusals are neither text nor reasoning."""
    assert generated_text(delta) == (text, reasoning, rest)


def test_ledger_counts_code_points_not_bytes() -> None:
    """`chars` are code points, on the fast way and on the other."""
    ledger = Ledger()
    ledger.count_delta({"content": "a🐟ü"})
    ledger.count_delta({"content": "b", "reasoning": "🐟"})
    ledger.chunks = 3
    ledger.bytes = 99

    assert ledger.observed == Observed(deltas=2, chunks=3, content_chars=4, reasoning_chars=1, bytes=99)


@pytest.mark.parametrize(
    ("deltas", "tokens"),
    [
        ([{"content": "a"}], 1),
        ([{"content": "abcd"}], 1),
        ([{"content": "abcde"}], 2),
        ([{"content": "🐟"}, {"reasoning": "abc"}, {"refusal": "ab"}], 3),
        ([{"tool_calls": [{"function": {"name": "f", "arguments": "1234"}}]}], 2),
    ],
)
@pytest.mark.parametrize("completed", [True, False])
def test_settle_without_report_estimates_from_what_was_generated(
    deltas: list[dict[str, Any]], tokens: int, completed: bool
) -> None:
    """Bytes of everything that was generated, rounded up, with the method beside the number."""
    ledger = Ledger()
    for delta in deltas:
        ledger.count_delta(delta)

    assert ledger.settle(completed=completed) == (
        {"completion_tokens": tokens},
        UsageSource.ESTIMATED,
        ESTIMATE_METHOD,
    )


def test_settle_with_nothing_generated_is_none_and_not_zero() -> None:
    """Unknown is never written as zero."""
    ledger = Ledger()
    ledger.count_delta({"role": "assistant"})
    ledger.count_delta({"content": ""})

    assert ledger.settle(completed=True) == (None, UsageSource.NONE, None)


@pytest.mark.parametrize(
    ("final", "completed", "source"),
    [
        (False, True, UsageSource.UPSTREAM),
        (True, True, UsageSource.UPSTREAM),
        (True, False, UsageSource.UPSTREAM),
        (False, False, UsageSource.UPSTREAM_PARTIAL),
    ],
)
def test_settle_with_reports_takes_the_last_verbatim(
    final: bool, completed: bool, source: UsageSource
) -> None:
    """Running totals are not added up; one that came before a break is called partial."""
    ledger = Ledger()
    ledger.count_delta({"content": "abc"})
    ledger.report({"completion_tokens": 1}, final=True)
    last = {"completion_tokens": 2, "cost": 0.5, "details": None}
    ledger.report(last, final=final)

    assert ledger.settle(completed=completed) == (last, source, None)
