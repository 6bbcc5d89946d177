"""`streamworker audit`: holds an events topic to the contract's reader rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from streamworker.cli.shared import config_option, quietly, run_async, settings_of
from streamworker.kafka.log import open_log
from streamworker.model import TopicPartition
from streamworker.reader import Auditor, Breach
from streamworker.wire.event import read_event
from streamworker.wire.job import read_job

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streamworker.config import Settings

    _Report = Callable[[Breach], None]

__all__ = ["audit"]


@click.command()
@config_option
@click.option("--topic", help="Events topic; default: topics.events.")
@click.option(
    "--complete",
    is_flag=True,
    help="No worker runs: a job of the job topics without terminal event is a breach.",
)
@click.option("--uncommitted", is_flag=True, help="Read as a read_uncommitted reader does.")
@click.pass_context
def audit(
    context: click.Context, config: Path | None, topic: str | None, complete: bool, uncommitted: bool
) -> int:
    """Read an events topic to its present end and report every breach of the reader rules.

    Exits with 0 if there is none, with 1 if there is one.
    """
    settings = settings_of(context, config)
    quietly()
    auditor = Auditor()
    breaches = run_async(
        _audit(settings, topic or settings.topics.events, auditor, complete, not uncommitted)
    )
    ended = (
        ", ".join(f"{count} {status}" for status, count in sorted(auditor.statuses.items())) or "none ended"
    )
    click.echo(
        f"{auditor.jobs} jobs ({ended}), {auditor.events} events, {auditor.superseded} attempts superseded, "
        f"{auditor.stale} stale events ignored: {breaches or 'no'} breach{'es' if breaches > 1 else ''}"
    )
    return 1 if breaches else 0


async def _audit(
    settings: Settings, topic: str, auditor: Auditor, complete: bool, committed_only: bool
) -> int:
    count = 0

    def report(breach: Breach) -> None:
        nonlocal count
        count += 1
        click.echo(str(breach))

    await _read_events(settings, topic, auditor, report, committed_only)
    if complete:
        for breach in auditor.finish():
            report(breach)
        await _look_for_lost_jobs(settings, topic, auditor, report)
    return count


async def _read_events(
    settings: Settings, topic: str, auditor: Auditor, report: _Report, committed_only: bool
) -> None:
    async with open_log(settings.kafka, topic, committed_only=committed_only) as log:
        async for record in log.snapshot([TopicPartition(topic, number) for number in log.partitions]):
            try:
                event = read_event(record.value or b"")
            except ValueError as error:
                report(auditor.unreadable(record.at, str(error)))
                continue
            for breach in auditor.read(event, record.at, record.key):
                report(breach)


async def _look_for_lost_jobs(settings: Settings, topic: str, auditor: Auditor, report: _Report) -> None:
    """Every job record whose events belong into this topic is owed a terminal event."""
    for jobs_topic in settings.topics.jobs:
        async with open_log(settings.kafka, jobs_topic) as log:
            async for record in log.snapshot(
                [TopicPartition(jobs_topic, number) for number in log.partitions]
            ):
                if record.value is None:
                    continue
                job = read_job(record, max_bytes=settings.worker.max_job_bytes)
                allowed = job.reply_to if job.reply_to in settings.topics.allowed_reply_to else None
                if (allowed or settings.topics.events) == topic and not auditor.has_ended(job.job_id):
                    report(Breach("lost job", record.at, job.job_id, f"no terminal event for {record.at}"))
