"""The final numbers of a run, as an OpenAI Batch object with the member `streamworker` besides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streamworker.batch.lines import URL

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streamworker.batch.accounting import Accounts, Price

__all__ = ["RETRY_TEXT", "ending_text", "summary"]

RETRY_TEXT = "the same command with --retry-failed runs the retriable ones again, with --retry-failed=all all failed lines"
"""What a user may do about the failed lines of a finished run."""


def ending_text(total: int, accounts: Accounts, duration: str) -> str:
    """Return the line that says how a finished run ended."""
    codes = ", ".join(f"{count:,} {code}" for code, count in accounts.codes.most_common())
    failed = f"{accounts.failed:,} failed" + (f" ({codes})" if codes else "")
    return f"{total:,} {'line' if total == 1 else 'lines'}: {accounts.completed:,} completed, {failed} in {duration}"


def summary(
    *,
    run: str,
    status: str,
    source: str,
    output: str | None,
    errors: str | None,
    created: int,
    expires: int | None,
    ended: int,
    total: int,
    accounts: Accounts,
    models: Mapping[str, int],
    metadata: Mapping[str, str],
    price: Price | None,
) -> dict[str, Any]:
    """Return the object. Times are given in ms since the epoch, and are in seconds in the object, as OpenAI has them."""
    at = dict.fromkeys(("finalizing", "failed", "expired", "cancelling", "cancelled", "completed"))
    ends: dict[str, Any] = {f"{name}_at": value for name, value in at.items()}
    if f"{status}_at" in ends:
        ends[f"{status}_at"] = ended // 1000
    return {
        "id": f"batch_{run}",
        "object": "batch",
        "endpoint": URL,
        "model": next(iter(models), None) if len(models) == 1 else None,
        "errors": None,
        "input_file_id": source,
        "completion_window": "24h",
        "status": status,
        "output_file_id": output if accounts.completed else None,
        "error_file_id": errors if accounts.failed else None,
        "created_at": created // 1000,
        "in_progress_at": created // 1000,
        "expires_at": None if expires is None else expires // 1000,
        **ends,
        "request_counts": {"total": total, "completed": accounts.completed, "failed": accounts.failed},
        "usage": accounts.usage(),
        "metadata": dict(metadata) or None,
        "streamworker": {
            "run": run,
            "codes": dict(accounts.codes.most_common()),
            "lines_estimated": accounts.estimated,
            "lines_unknown": accounts.unknown,
            "models": dict(models),
            "cost": None if price is None else round(price.cost(accounts.tokens), 6),
            "reported_cost": round(accounts.reported_cost, 6) if accounts.reported else None,
        },
    }
