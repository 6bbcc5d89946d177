"""Tokens, costs and the final summary of a run, by the source of each number.

A line whose usage is unknown is counted as such, and one odd line never spoils the sums of the others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from streamworker.wire.json import as_count

__all__ = ["Accounts", "Price", "Tokens", "read_price"]

_XAI_TICKS = 10_000_000_000
"""Ticks of `usage.cost_in_usd_ticks` per dollar."""


@dataclass(kw_only=True)
class Tokens:
    """Sums of tokens."""

    input: int = 0
    cached: int = 0
    output: int = 0
    reasoning: int = 0

    @property
    def total(self) -> int:
        """Input and output."""
        return self.input + self.output


@dataclass(frozen=True, kw_only=True)
class Price:
    """Prices per million tokens, in any currency. Cached input costs `input` where `cached` is None."""

    input: float
    output: float
    cached: float | None = None

    def cost(self, tokens: Tokens) -> float:
        """Return the price of some tokens."""
        cached = self.input if self.cached is None else self.cached
        plain = max(0, tokens.input - tokens.cached)
        return (plain * self.input + tokens.cached * cached + tokens.output * self.output) / 1_000_000

    def __str__(self) -> str:
        """Return the prices as they were given."""
        return "/".join(f"{price:g}" for price in (self.input, self.output, self.cached) if price is not None)


def read_price(text: str) -> Price:
    """Read `IN,OUT` or `IN,OUT,CACHED`. Raises ValueError."""
    parts = text.split(",")
    if len(parts) not in {2, 3}:
        raise ValueError("expected IN,OUT or IN,OUT,CACHED, prices per million tokens, as in 0.15,0.60")
    prices = [float(part) for part in parts]
    if not all(0 <= price < float("inf") for price in prices):
        raise ValueError("a price must be a number of at least 0")
    return Price(input=prices[0], output=prices[1], cached=prices[2] if len(prices) == 3 else None)


@dataclass(kw_only=True)
class Accounts:
    """What the lines of a batch used, and how they ended."""

    tokens: Tokens = field(default_factory=Tokens)
    completed: int = 0
    failed: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    """Failed lines by code."""
    estimated: int = 0
    """Lines whose usage is estimated, or the last report before a break. They are in the sums where they have numbers."""
    unknown: int = 0
    """Lines that ran and whose usage is not known."""
    reported_cost: float = 0.0
    reported: int = 0
    """Lines whose upstream reported a cost."""
    models: Counter[str] = field(default_factory=Counter)

    def add_completed(self, usage: Any, source: str) -> None:
        """Count a completed line."""
        self.completed += 1
        self._add(usage, source, ran=True)

    def add_failed(self, code: str, usage: Any, source: str) -> None:
        """Count a failed line. With the source `none` and no usage, nothing was generated."""
        self.failed += 1
        self.codes[code] += 1
        self._add(usage, source, ran=source != "none")

    def _add(self, usage: Any, source: str, *, ran: bool) -> None:
        if source in {"estimated", "upstream_partial"}:
            self.estimated += 1
        tokens = tokens_of(usage)
        if tokens is None:
            self.unknown += ran
            return
        self.tokens.input += tokens.input
        self.tokens.cached += tokens.cached
        self.tokens.output += tokens.output
        self.tokens.reasoning += tokens.reasoning
        if (cost := _cost_of(usage)) is not None:
            self.reported_cost += cost
            self.reported += 1

    def usage(self) -> dict[str, Any]:
        """Return the `usage` of an OpenAI Batch object."""
        return {
            "input_tokens": self.tokens.input,
            "input_tokens_details": {"cached_tokens": self.tokens.cached},
            "output_tokens": self.tokens.output,
            "output_tokens_details": {"reasoning_tokens": self.tokens.reasoning},
            "total_tokens": self.tokens.total,
        }

    def describe(self, price: Price | None) -> list[str]:
        """Return the lines about tokens and costs that end a run."""
        tokens = self.tokens
        text = f"tokens: {tokens.input:,} in ({tokens.cached:,} cached), {tokens.output:,} out ({tokens.reasoning:,} reasoning)"
        parts = [f"{self.estimated:,} lines estimated"] if self.estimated else []
        parts += [f"{self.unknown:,} unknown"] if self.unknown else []
        lines = ["; ".join([text, ", ".join(parts)]) if parts else text]
        own = f"{self.reported_cost:.4f} for {self.reported:,} lines" if self.reported else "-"
        if price is not None:
            missing = f" (estimates included, without the {self.unknown:,})" if self.unknown else ""
            lines.append(
                f"cost: {price.cost(tokens):.2f} at {price} per million{missing}; upstream's own figure: {own}"
            )
        elif self.reported:
            lines.append(f"cost: upstream's own figure: {own}")
        return lines


def tokens_of(usage: Any) -> Tokens | None:
    """Return the counts of a usage object; None if neither prompt nor completion has a believable count."""
    if type(usage) is not dict:
        return None
    prompt = _count(usage, "prompt_tokens", "input_tokens")
    completion = _count(usage, "completion_tokens", "output_tokens")
    if prompt is None and completion is None:
        return None
    return Tokens(
        input=prompt or 0,
        cached=_detail(usage, ("prompt_tokens_details", "input_tokens_details"), "cached_tokens"),
        output=completion or 0,
        reasoning=_detail(usage, ("completion_tokens_details", "output_tokens_details"), "reasoning_tokens"),
    )


def _count(usage: dict[str, Any], *names: str) -> int | None:
    return next((count for name in names if (count := as_count(usage.get(name))) is not None), None)


def _detail(usage: dict[str, Any], groups: tuple[str, ...], name: str) -> int:
    for group in groups:
        details = usage.get(group)
        if type(details) is dict and (count := as_count(details.get(name))) is not None:
            return count
    return 0


def _cost_of(usage: dict[str, Any]) -> float | None:
    cost = usage.get("cost")
    if isinstance(cost, int | float) and not isinstance(cost, bool) and 0 <= cost < float("inf"):
        return float(cost)
    ticks = as_count(usage.get("cost_in_usd_ticks"))
    return None if ticks is None else ticks / _XAI_TICKS
