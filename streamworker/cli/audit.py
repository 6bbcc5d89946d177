"""`streamworker audit`: check an events topic, and the results topic, against the rules of docs/delivery.md."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from streamworker.cli.records import records_of
from streamworker.cli.shared import config_option, quietly, run_async, settings_of, timeout_option
from streamworker.errors import KafkaError
from streamworker.reader import Auditor, Breach, ResultAuditor
from streamworker.wire.event import read_event
from streamworker.wire.job import is_rerun, job_id_of, read_job

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from streamworker.config import Settings
    from streamworker.model import ConsumerRecord

__all__ = ["audit"]

_MAX_SUSPECTS = 10_000


@click.command(short_help="Check an events topic against the rules for readers.")
@config_option
@timeout_option
@click.option("--topic", help="Events topic; default: topics.events.")
@click.option(
    "--complete",
    is_flag=True,
    help="No worker is running: report every job of the job topics that has no terminal event.",
)
@click.option("--uncommitted", is_flag=True, help="Read as a read_uncommitted reader.")
@click.pass_context
def audit(
    context: click.Context,
    config: Path | None,
    timeout_s: float,
    topic: str | None,
    complete: bool,
    uncommitted: bool,
) -> int:
    """Read an events topic up to its current end and report every breach of the rules for readers.

    A job that `dlq replay` or `retry` submitted again has several runs; the last one counts. With a results topic, each
    terminal event must have one result with the same members; jobs that ended before its first record are not judged.

    Exits with 0 if there is no breach, else with 1.
    """
    settings = settings_of(context, config)
    quietly()
    auditing = _Audit(settings, topic or settings.topics.events, timeout_s, committed_only=not uncommitted)
    breaches = run_async(auditing.run(complete=complete))
    auditor = auditing.auditor
    ended = ", ".join(f"{count} {status}" for status, count in sorted(auditor.statuses.items()))
    click.echo(
        f"{auditor.jobs} jobs ({ended or 'none ended'}), {auditor.events} events, "
        f"{auditor.superseded} attempts superseded, {auditor.stale} stale events ignored, "
        f"{auditor.reruns} further runs{auditing.described_results}: {breaches or 'no'} breach{'es' if breaches > 1 else ''}"
    )
    return 1 if breaches else 0


class _Audit:
    """One audit. `run` prints every breach and returns their number."""

    def __init__(self, settings: Settings, topic: str, timeout_s: float, *, committed_only: bool) -> None:
        self._settings = settings
        self._topic = topic
        self._timeout_s = timeout_s
        self._committed_only = committed_only
        self._breaches = 0
        self._suspects: list[Breach] = []
        self._results = ResultAuditor() if settings.topics.results else None
        self.auditor = Auditor(self._results)

    @property
    def described_results(self) -> str:
        """The number of results for the summary; empty without a results topic."""
        return "" if self._results is None else f", {self._results.results} results"

    async def run(self, *, complete: bool) -> int:
        await self._read_events()
        await self._judge_suspects()
        if self._results is not None:
            await self._read_results(self._results)
        if complete:
            for breach in self.auditor.finish():
                self._report(breach)
            await self._report_lost_jobs()
        return self._breaches

    def _report(self, breach: Breach) -> None:
        self._breaches += 1
        click.echo(str(breach))

    async def _read_events(self) -> None:
        async for record in self._records(self._topic, committed_only=self._committed_only):
            try:
                event = read_event(record.value or b"")
            except ValueError as error:
                self._report(self.auditor.unreadable(record.at, str(error)))
                continue
            for breach in self.auditor.read(event, record.at, record.key):
                is_rejection = event["type"] == "usage" and event["seq"] == 0
                if is_rejection and len(self._suspects) < _MAX_SUSPECTS:
                    self._suspects.append(breach)
                else:
                    self._report(breach)

    async def _read_results(self, results: ResultAuditor) -> None:
        async for record in self._records(self._settings.topics.results):
            if record.value is None:
                results.erased(record.key)
                continue
            try:
                result = read_event(record.value)
            except ValueError as error:
                self._report(self.auditor.unreadable(record.at, f"result: {error}"))
                continue
            for breach in results.read(result, record.at, record.key):
                self._report(breach)
        for breach in results.finish():
            self._report(breach)

    async def _judge_suspects(self) -> None:
        """Report the second terminal events of rejected jobs, except for jobs that were submitted again."""
        if not self._suspects:
            return
        again: set[str] = set()
        try:
            for topic in self._settings.topics.jobs:
                async for record in self._records(topic):
                    if record.value is not None and is_rerun(record.headers):
                        again.add(job_id_of(record, max_bytes=self._settings.worker.max_job_bytes))
        except KafkaError as error:
            click.echo(
                f"the job topics cannot be read, so replayed jobs are not recognized: {error}", err=True
            )
        for breach in self._suspects:
            if breach.job_id not in again:
                self._report(breach)

    async def _report_lost_jobs(self) -> None:
        """Report every job record whose events belong to the topic and that has no terminal event."""
        topics = self._settings.topics
        for jobs_topic in topics.jobs:
            async for record in self._records(jobs_topic):
                if record.value is None:
                    continue
                job = read_job(record, max_bytes=self._settings.worker.max_job_bytes)
                allowed = job.reply_to if job.reply_to in topics.allowed_reply_to else None
                if (allowed or topics.events) == self._topic and not self.auditor.has_ended(job.job_id):
                    self._report(
                        Breach("lost job", record.at, job.job_id, f"no terminal event for {record.at}")
                    )

    def _records(self, topic: str, *, committed_only: bool = True) -> AsyncIterator[ConsumerRecord]:
        return records_of(self._settings.kafka, topic, self._timeout_s, committed_only=committed_only)
