"""The usage ledger: reported, seen, and what follows from both."""

from __future__ import annotations

from typing import Any

import pytest

from streamworker.model import Observed, UsageSource
from streamworker.stream.usage import ESTIMATE_METHOD, Ledger, Tokenizer, generated_text


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
    assert ledger.reported(completed=completed) == (last if source is UsageSource.UPSTREAM else None)


def words(text: str) -> int:
    return len(text.split())


def test_ledger_with_a_tokenizer_counts_what_was_not_reported() -> None:
    """The estimate names the vocabulary; text, reasoning and calls count."""
    ledger = Ledger(Tokenizer("words", words))
    ledger.count_delta({"content": "one two "})
    ledger.count_delta({"content": "three ", "reasoning_content": "four "})
    ledger.count_delta({"tool_calls": [{"function": {"name": "five", "arguments": " six"}}]})
    usage, source, method = ledger.settle(completed=False)

    assert (usage, source) == ({"completion_tokens": 6}, "estimated")
    assert method is not None
    assert method.startswith("words tokens of the generated text")
    assert ledger.settle(completed=False) == (usage, source, method)


def test_ledger_with_a_tokenizer_keeps_no_more_text_than_a_bound() -> None:
    """A stream that never ends must not fill the memory."""
    counted: list[int] = []

    def count(text: str) -> int:
        counted.append(len(text))
        return 1

    ledger = Ledger(Tokenizer("pieces", count))
    for _ in range(1000):
        ledger.count_delta({"content": "x" * 1000})

    assert len(counted) == 15
    assert max(counted) < (1 << 16) + 1000
    assert sum(map(len, ledger._text)) < 1 << 16


def test_ledger_with_a_report_asks_no_tokenizer() -> None:
    """What the upstream says goes before what we count."""

    def count(text: str) -> int:
        raise AssertionError(text)

    ledger = Ledger(Tokenizer("none", count))
    ledger.count_delta({"content": "one"})
    ledger.report({"completion_tokens": 5}, final=True)

    assert ledger.settle(completed=True) == ({"completion_tokens": 5}, "upstream", None)


@pytest.mark.parametrize(
    ("report", "total", "completion"),
    [
        (None, None, None),
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 9}, 9, 4),
        ({"prompt_tokens": 3, "completion_tokens": 4}, 7, 4),
        ({"completion_tokens": 4}, None, 4),
        ({"total_tokens": "many", "completion_tokens": -1, "prompt_tokens": True}, None, None),
        ({"total_tokens": 10**400, "completion_tokens": 10**18}, None, None),
    ],
)
def test_ledger_tells_what_a_call_came_to_as_far_as_it_was_reported(
    report: dict[str, Any] | None, total: int | None, completion: int | None
) -> None:
    """For the upstream's own limits; an estimate is not passed off as a count."""
    ledger = Ledger()
    ledger.count_delta({"content": "text"})
    if report is not None:
        ledger.report(report, final=True)

    assert (ledger.total_tokens, ledger.completion_tokens) == (total, completion)
