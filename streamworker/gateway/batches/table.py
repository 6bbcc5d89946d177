"""The files and batches of the state topic, in memory. No I/O: `apply` is called for each record, in the log's order."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from streamworker.batch.lines import URL
from streamworker.gateway.batches.records import (
    BatchRecord,
    CancellationRecord,
    FileRecord,
    RunRecordOfBatch,
    read_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from streamworker.batch.record import RunRecord

__all__ = ["Page", "Table"]


class Page(list[Any]):
    """Records of one page of a list. `has_more` is whether the list continues."""

    has_more = False


class Table:
    """What every gateway knows of files and batches."""

    def __init__(self) -> None:
        self._files: dict[str, FileRecord] = {}
        self._batches: dict[str, BatchRecord] = {}
        self._cancellations: dict[str, CancellationRecord] = {}
        self._runs: dict[str, RunRecord] = {}
        self._files_of: Counter[str] = Counter()
        self._batches_of: Counter[str] = Counter()

    def apply(self, key: str, value: bytes | None) -> str | None:
        """Take a record over; return the id of the batch or file that it is about. Raises ValueError."""
        if value is None:
            return self._remove(key)
        record = read_state(value)
        if isinstance(record, FileRecord):
            if record.id not in self._files:
                self._files_of[record.tenant] += 1
            self._files[record.id] = record
            return record.id
        if isinstance(record, BatchRecord):
            known = self._batches.get(record.id)
            if known is None:
                self._batches_of[record.tenant] += 1
            if known is None or not known.has_ended:  # an owner that was replaced may write once more
                self._batches[record.id] = record
            return record.id
        if isinstance(record, CancellationRecord):
            self._cancellations.setdefault(record.batch_id, record)
        else:
            self._apply_run(record)
        return record.batch_id

    def file(self, file_id: str) -> FileRecord | None:
        """Return a file."""
        return self._files.get(file_id)

    def batch(self, batch_id: str) -> BatchRecord | None:
        """Return a batch as its owner wrote it."""
        return self._batches.get(batch_id)

    def files_of(self, tenant: str) -> int:
        """Return how many files a tenant has; an empty one has those of keys without a tenant."""
        return self._files_of[tenant]

    def batches_of(self, tenant: str) -> int:
        """Return how many batches a tenant has, ended ones included; as `files_of`."""
        return self._batches_of[tenant]

    def statuses(self) -> Counter[str]:
        """Return how many batches have each status."""
        return Counter(
            "cancelling" if self.is_cancelled(batch.id) and not batch.has_ended else batch.status
            for batch in self._batches.values()
        )

    def run(self, batch_id: str) -> RunRecord | None:
        """Return the record of a batch's run, if it has submitted jobs."""
        return self._runs.get(batch_id)

    def is_cancelled(self, batch_id: str) -> bool:
        """Whether a client has cancelled the batch."""
        return batch_id in self._cancellations

    def unfinished(self) -> list[BatchRecord]:
        """Return the batches that have not ended, oldest first."""
        return sorted((b for b in self._batches.values() if not b.has_ended), key=lambda batch: batch.id)

    def expired(self, now_s: float, kept_s: float) -> list[str]:
        """Return the ids of files that have expired, and of batches that ended `kept_s` seconds ago."""
        files = [file.id for file in self._files.values() if file.expires_at <= now_s]
        batches = [
            batch.id
            for batch in self._batches.values()
            if batch.ended_at is not None and batch.ended_at + kept_s <= now_s
        ]
        return files + batches

    def files(
        self,
        tenant: str,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        ascending: bool = False,
    ) -> Page:
        """Return a page of a tenant's files, newest first. An empty tenant sees all."""
        found = (file for file in self._files.values() if purpose is None or file.purpose == purpose)
        return _page(found, tenant, after, limit, ascending=ascending)

    def batches(self, tenant: str, *, after: str | None = None, limit: int = 20) -> Page:
        """Return a page of a tenant's batches, newest first. An empty tenant sees all."""
        return _page(self._batches.values(), tenant, after, limit)

    def value(self, batch: BatchRecord) -> dict[str, Any]:
        """Return OpenAI's batch object."""
        status, cancelling_at = batch.status, None
        if (cancellation := self._cancellations.get(batch.id)) is not None:
            cancelling_at = cancellation.requested_at
            status = batch.status if batch.has_ended else "cancelling"
        ended = {f"{name}_at": None for name in ("failed", "completed", "expired", "cancelled")}
        if batch.has_ended:
            ended[f"{batch.status}_at"] = batch.ended_at  # type: ignore[assignment]  # None until then
        return {
            "id": batch.id,
            "object": "batch",
            "endpoint": URL,
            "model": batch.model,
            "errors": None if batch.errors is None else {"object": "list", "data": batch.errors},
            "input_file_id": batch.input_file_id,
            "completion_window": batch.completion_window,
            "status": status,
            "output_file_id": batch.output_file_id,
            "error_file_id": batch.error_file_id,
            "created_at": batch.created_at,
            "in_progress_at": batch.in_progress_at,
            "expires_at": batch.expires_at,
            "finalizing_at": batch.finalizing_at,
            "cancelling_at": cancelling_at,
            **ended,
            "request_counts": {
                "total": batch.total,
                "completed": batch.completed,
                "failed": batch.failed,
            },
            "usage": batch.usage,
            "metadata": batch.metadata,
        }

    def _apply_run(self, record: RunRecordOfBatch) -> None:
        known = self._runs.get(record.batch_id)
        # The first start of a run counts: two owners may overlap, and later offsets would hide submitted jobs.
        if known is None or known.created == record.record.created:
            self._runs[record.batch_id] = record.record

    def _remove(self, key: str) -> str:
        id_, _, part = key.partition(".")
        if part == "cancellation":
            self._cancellations.pop(id_, None)
        elif part == "run":
            self._runs.pop(id_, None)
        else:
            if (file := self._files.pop(id_, None)) is not None:
                _uncount(self._files_of, file.tenant)
            if (batch := self._batches.pop(id_, None)) is not None:
                _uncount(self._batches_of, batch.tenant)
        return id_


def _uncount(of: Counter[str], tenant: str) -> None:
    of[tenant] -= 1
    if not of[tenant]:
        del of[tenant]


def _page(
    found: Iterable[Any],
    tenant: str,
    after: str | None,
    limit: int,
    *,
    ascending: bool = False,
) -> Page:
    """Ids contain the time of their creation, so that their order is that of creation."""
    is_behind: Callable[[str], bool] = lambda _: True  # noqa: E731 - one of two rules
    if after is not None:
        is_behind = (lambda id_: id_ > after) if ascending else (lambda id_: id_ < after)
    mine = [record for record in found if (not tenant or record.tenant == tenant) and is_behind(record.id)]
    mine.sort(key=lambda record: record.id, reverse=not ascending)
    page = Page(mine[:limit])
    page.has_more = len(mine) > limit
    return page
