"""Tokens, costs, the summary, and progress."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import Batch

from streamworker.batch.accounting import Accounts, Price, Tokens, read_price, tokens_of
from streamworker.batch.progress import Progress, duration
from streamworker.batch.summary import ending_text, summary
from streamworker.batch.window import MAX_CHUNK_JOBS, Window


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        (None, None),
        ("x", None),
        ({}, None),
        ({"prompt_tokens": "3"}, None),
        ({"prompt_tokens": -1}, None),
        ({"prompt_tokens": True, "completion_tokens": 1e9}, None),
        ({"prompt_tokens": 3}, Tokens(input=3)),
        ({"prompt_tokens": 3, "completion_tokens": 4}, Tokens(input=3, output=4)),
        ({"input_tokens": 3, "output_tokens": 4}, Tokens(input=3, output=4)),
        ({"prompt_tokens": 3, "prompt_tokens_details": None}, Tokens(input=3)),
        (
            {
                "prompt_tokens": 3,
                "completion_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 2},
                "completion_tokens_details": {"reasoning_tokens": 1},
            },
            Tokens(input=3, output=4, cached=2, reasoning=1),
        ),
    ],
)
def test_tokens_of_a_usage(usage: Any, expected: Tokens | None) -> None:
    """An object without a believable count is unknown, and never zero."""
    assert tokens_of(usage) == expected


def test_accounts_count_unknown_usage_as_unknown() -> None:
    """And estimates as estimates: they are in the sums."""
    accounts = Accounts()
    accounts.add_completed({"prompt_tokens": 10, "completion_tokens": 5}, "upstream")
    accounts.add_completed({"completion_tokens": 7}, "estimated")
    accounts.add_completed(None, "unknown")
    accounts.add_failed("timeout_idle", None, "none")
    accounts.add_failed("truncated", {"completion_tokens": 2}, "upstream_partial")

    assert (accounts.completed, accounts.failed) == (3, 2)
    assert (accounts.tokens.input, accounts.tokens.output, accounts.tokens.total) == (10, 14, 24)
    assert (accounts.estimated, accounts.unknown) == (2, 1)
    assert accounts.codes == {"timeout_idle": 1, "truncated": 1}


def test_accounts_add_up_every_kind_of_token() -> None:
    """As OpenAI's `usage` of a batch has them."""
    accounts = Accounts()
    for number in (1, 10):
        usage = {
            "prompt_tokens": 5 * number,
            "completion_tokens": 7 * number,
            "prompt_tokens_details": {"cached_tokens": 2 * number},
            "completion_tokens_details": {"reasoning_tokens": 3 * number},
        }
        accounts.add_completed(usage, "upstream")

    assert accounts.usage() == {
        "input_tokens": 55,
        "input_tokens_details": {"cached_tokens": 22},
        "output_tokens": 77,
        "output_tokens_details": {"reasoning_tokens": 33},
        "total_tokens": 132,
    }


@pytest.mark.parametrize(
    ("usage", "cost"),
    [
        ({"completion_tokens": 1, "cost": 0.25}, 0.25),
        ({"completion_tokens": 1, "cost": 1}, 1.0),
        ({"completion_tokens": 1, "cost_in_usd_ticks": 5_000_000_000}, 0.5),
        ({"completion_tokens": 1, "cost": True}, None),
        ({"completion_tokens": 1, "cost": -1}, None),
        ({"completion_tokens": 1, "cost": "1"}, None),
        ({"completion_tokens": 1}, None),
    ],
)
def test_cost_is_the_upstream_s_own_figure(usage: dict[str, Any], cost: float | None) -> None:
    """There is no price list."""
    accounts = Accounts()
    accounts.add_completed(usage, "upstream")

    assert (accounts.reported_cost if accounts.reported else None) == cost


@pytest.mark.parametrize(
    ("text", "cost"), [("1,2", 5.0), ("1,2,0.5", 4.5), ("0,0", 0.0), ("0.15, 0.60", 1.35)]
)
def test_price_of_tokens(text: str, cost: float) -> None:
    """Per million; cached input has a price of its own if one is given."""
    tokens = Tokens(input=1_000_000, cached=1_000_000, output=2_000_000)

    assert read_price(text).cost(tokens) == pytest.approx(cost)


@pytest.mark.parametrize("text", ["", "1", "1,2,3,4", "a,b", "1,-2", "nan,1", "inf,1"])
def test_price_that_is_not_valid_is_refused(text: str) -> None:
    """The message says what is expected."""
    with pytest.raises(ValueError):
        read_price(text)


def test_accounts_describe_themselves() -> None:
    """The lines that end a run."""
    accounts = Accounts()
    accounts.add_completed({"prompt_tokens": 2_000_000, "completion_tokens": 1_000_000}, "upstream")
    assert accounts.describe(None) == ["tokens: 2,000,000 in (0 cached), 1,000,000 out (0 reasoning)"]

    accounts.add_completed({"completion_tokens": 0, "cost": 0.5}, "estimated")
    accounts.add_failed("x", None, "estimated")
    assert accounts.describe(Price(input=1, output=2)) == [
        "tokens: 2,000,000 in (0 cached), 1,000,000 out (0 reasoning); 2 lines estimated, 1 unknown",
        "cost: 4.00 at 1/2 per million (estimates included, without the 1); upstream's own figure: 0.5000 for 1 lines",
    ]
    assert accounts.describe(None)[1] == "cost: upstream's own figure: 0.5000 for 1 lines"


@pytest.mark.parametrize("status", ["completed", "in_progress", "cancelled", "failed"])
def test_summary_is_an_openai_batch(status: str) -> None:
    """Strictly, by the SDK's own model; times are in seconds."""
    accounts = Accounts()
    accounts.add_completed({"prompt_tokens": 3, "completion_tokens": 4}, "upstream")
    made = summary(
        run="r", status=status, source="i", output="o", errors="e", created=5000, expires=9000, ended=7000, total=2,
        accounts=accounts, models={"m": 2}, metadata={"team": "blue"}, price=Price(input=1, output=2),
    )  # fmt: skip
    batch = Batch.model_validate(made, strict=True)

    assert (batch.status, batch.model, batch.created_at, batch.expires_at) == (status, "m", 5, 9)
    assert batch.usage is not None
    assert batch.usage.total_tokens == 7
    assert (batch.output_file_id, batch.error_file_id) == ("o", None)
    assert (made["completed_at"], made["cancelled_at"]) == (
        7 if status == "completed" else None,
        7 if status == "cancelled" else None,
    )
    assert made["streamworker"]["cost"] == 0.000011


def test_summary_of_an_open_run_has_nothing_that_is_unknown() -> None:
    """Null where there is none: expiry, end, files, model of several models, metadata, prices."""
    accounts = Accounts()
    made = summary(
        run="r", status="in_progress", source="i", output="o", errors="e", created=5999, expires=None, ended=7000,
        total=2, accounts=accounts, models={"m": 1, "n": 1}, metadata={}, price=None,
    )  # fmt: skip
    ends = [
        f"{name}_at" for name in ("finalizing", "failed", "expired", "cancelling", "cancelled", "completed")
    ]

    assert (made["created_at"], made["in_progress_at"], made["expires_at"]) == (5, 5, None)
    assert {made[name] for name in ends} == {None}
    assert made.keys() == {*Batch.model_fields, "streamworker"}
    assert (made["output_file_id"], made["error_file_id"], made["model"], made["metadata"]) == (None,) * 4
    assert (made["streamworker"]["cost"], made["streamworker"]["reported_cost"]) == (None, None)


def test_summary_names_sources_of_its_figures() -> None:
    """What the upstream reported, what was estimated, and what is not known."""
    accounts = Accounts()
    accounts.add_completed({"completion_tokens": 1, "cost": 0.12345678}, "upstream")
    accounts.add_completed({"completion_tokens": 1}, "estimated")
    accounts.add_failed("x", None, "unknown")
    made = summary(
        run="r", status="completed", source="i", output="o", errors="e", created=0, expires=1000, ended=2000,
        total=3, accounts=accounts, models={"m": 3}, metadata={"team": "blue"}, price=Price(input=0, output=0.5),
    )  # fmt: skip

    assert made["metadata"] == {"team": "blue"}
    assert (made["output_file_id"], made["error_file_id"], made["expires_at"]) == ("o", "e", 1)
    assert made["streamworker"] == {
        "run": "r", "codes": {"x": 1}, "lines_estimated": 1, "lines_unknown": 1, "models": {"m": 3}, "cost": 0.000001,
        "reported_cost": 0.123457,
    }  # fmt: skip


def test_ending_text_counts_codes() -> None:
    """The most frequent one first."""
    accounts = Accounts()
    for code in ("a", "b", "b"):
        accounts.add_failed(code, None, "none")

    assert ending_text(3, accounts, "0:00:09") == "3 lines: 0 completed, 3 failed (2 b, 1 a) in 0:00:09"
    assert ending_text(1, Accounts(), "0:00:01") == "1 line: 0 completed, 0 failed in 0:00:01"


# Progress


def test_progress_has_the_rate_of_the_last_two_minutes() -> None:
    """A slow start is forgotten."""
    progress = Progress(0.0)
    for second in range(1, 241):
        for _ in range(1 if second <= 120 else 10):
            progress.ended(float(second), 100)
        progress.rates(float(second))
    shown = progress.snapshot(240.0, total=5000, completed=1300, failed=20, in_flight=7, oldest=("c", 200.0))

    assert shown.lines_per_s == pytest.approx(10, abs=0.2)
    assert shown.tokens_per_s == pytest.approx(1000, abs=20)
    assert shown.eta_s == pytest.approx(368, abs=8)
    assert shown.oldest is None


def test_progress_names_the_oldest_line_after_a_minute_without_an_ending() -> None:
    """Driven by the clock: nothing has to end for it."""
    progress = Progress(0.0)
    progress.ended(5.0, 0)
    early = progress.snapshot(64.0, total=3, completed=1, failed=0, in_flight=2, oldest=("c" * 200, 1.0))
    late = progress.snapshot(65.0, total=3, completed=1, failed=0, in_flight=2, oldest=("c" * 200, 1.0))

    assert early.oldest is None
    assert late.oldest == ("c" * 200, 64.0)
    assert late.plain_text().endswith(f"oldest in flight 64 s ({'c' * 80})")
    assert f"oldest 64 s ({'c' * 80})" in late.bar_text()
    assert late.as_object()["oldest"] == {"custom_id": "c" * 200, "age_s": 64}


def test_progress_without_endings_has_no_remaining_time() -> None:
    """And a batch without lines is done."""
    progress = Progress(0.0)

    assert progress.snapshot(9.0, total=5, completed=0, failed=0, in_flight=0, oldest=None).eta_s is None
    assert progress.snapshot(9.0, total=0, completed=0, failed=0, in_flight=0, oldest=None).eta_s == 0


def test_progress_texts() -> None:
    """As documented."""
    progress = Progress(0.0)
    for _ in range(314):
        progress.ended(10.0, 585)
    shown = progress.snapshot(10.0, total=50_000, completed=37_470, failed=42, in_flight=1000, oldest=None)

    assert (
        shown.bar_text()
        == "37,512/50,000  75 % · 42 failed · 1,000 in flight · 31.4 lines/s · 18.4k tok/s · eta 0:06:38"
    )
    assert (
        shown.plain_text() == "batch: 37512/50000 done, 42 failed, 1000 in flight, 31.4 lines/s, eta 0:06:38"
    )
    assert shown.as_object() == {
        "total": 50_000, "completed": 37_470, "failed": 42, "in_flight": 1000, "lines_per_s": 31.4,
        "tokens_per_s": 18369.0, "eta_s": 398, "oldest": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (360_000, "100:00:00")],
)
def test_duration(seconds: float | None, text: str) -> None:
    """Hours, minutes, seconds."""
    assert duration(seconds) == text


# The window


@pytest.mark.parametrize(
    ("size", "in_flight", "room"),
    [
        (1000, 0, 200),
        (1000, 900, 100),
        (1000, 901, 0),
        (1000, 1500, 0),
        (10, 9, 1),
        (10, 10, 0),
        (1, 0, 1),
        (1, 1, 0),
        (100_000, 99_900, 0),
        (100_000, 99_800, MAX_CHUNK_JOBS),
    ],
)
def test_window_has_room_for_a_chunk(size: int, in_flight: int, room: int) -> None:
    """A tenth of it, at most a chunk, must be free."""
    assert Window(size).room(in_flight) == room


def test_window_without_lines_is_refused() -> None:
    """At least one line must fit."""
    with pytest.raises(ValueError):
        Window(0)
