"""`streamworker retry`: submit ended jobs again."""

from __future__ import annotations

import time
from collections import defaultdict
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import click

from streamworker.cli.records import home_of, records_of, write
from streamworker.cli.shared import (
    config_option,
    parse_since,
    quietly,
    run_async,
    settings_of,
    timeout_option,
    waiting,
    within,
)
from streamworker.errors import KafkaRefused, StreamworkerError
from streamworker.kafka.log import open_log
from streamworker.kafka.sink import KafkaSink
from streamworker.model import Coordinates, Job, ProducerRecord, Status, TopicPartition
from streamworker.wire.event import read_event
from streamworker.wire.job import RERUN, read_job
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from streamworker.config import Settings
    from streamworker.model import ConsumerRecord

__all__ = ["retry"]

_STATUSES = [Status.FAILED, Status.INTERRUPTED, Status.EXPIRED, Status.CANCELLED]


@click.command(short_help="Submit ended jobs again, as new runs.")
@config_option
@timeout_option
@click.option(
    "--status",
    "statuses",
    multiple=True,
    type=click.Choice([status.value for status in _STATUSES]),
    help="Only jobs that ended with this status; may be repeated.",
)
@click.option("--code", "codes", multiple=True, help="Only jobs with this error code; may be repeated.")
@click.option(
    "--since",
    "since_ms",
    callback=parse_since,
    metavar="TIME",
    help="Only jobs that ended after this time: 90m, 2h, 3d, or RFC 3339.",
)
@click.option("--topic", help="Events topic; default: topics.events.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.option(
    "--max-jobs",
    default=10_000,
    show_default=True,
    type=click.IntRange(1, 1_000_000),
    help="Do nothing if more jobs are selected.",
)
@click.pass_context
def retry(
    context: click.Context,
    config: Path | None,
    timeout_s: float,
    statuses: Sequence[str],
    codes: Sequence[str],
    since_ms: float,
    topic: str | None,
    dry_run: bool,
    max_jobs: int,
) -> int:
    """Submit ended jobs again, as new runs under the same ids: --status, --code, or both are required.

    The job records are read from the job topics, as long as they are retained. A job whose last run has not ended is
    not selected. If the command is interrupted, or run twice before the workers have started the jobs, jobs are
    submitted twice.

    \b
    streamworker retry --status failed --code upstream_unavailable --since 2h --dry-run

    Rejected jobs have dead letters: see `streamworker dlq replay`.

    Exits with 1 if a selected job could not be submitted.
    """
    if not (statuses or codes):
        raise click.UsageError("--status or --code is required")
    settings = settings_of(context, config)
    quietly()
    selection = _Selection(frozenset(statuses), frozenset(codes), since_ms, max_jobs)
    retrying = _Retry(settings, selection, topic or settings.topics.events, timeout_s, dry_run=dry_run)
    return 0 if run_async(retrying.run()) else 1


class _Selection:
    """Select jobs by their last terminal event. Holds the open jobs and at most `max_jobs` selected ones."""

    def __init__(
        self, statuses: frozenset[str], codes: frozenset[str], since_ms: float, max_jobs: int
    ) -> None:
        self._statuses = statuses
        self._codes = codes
        self._since_ms = since_ms
        self._max_jobs = max_jobs
        self._open: dict[str, Coordinates | None] = {}
        self.sources: dict[str, Coordinates | None] = {}
        """Selected job id → coordinates of its record, None for a rejected job."""

    def read(self, event: Mapping[str, Any]) -> None:
        """Read a `started` or `usage` event. Raises StreamworkerError if too many jobs are selected."""
        job_id = event["job_id"]
        if event["type"] == "started":
            self._open[job_id] = _coordinates(event.get("source"))
            self.sources.pop(job_id, None)
        elif event["type"] == "usage":
            source = self._open.pop(job_id, None)
            self.sources.pop(job_id, None)
            if self._matches(event):
                self.sources[job_id] = source
                if len(self.sources) > self._max_jobs:
                    raise StreamworkerError(
                        f"more than {self._max_jobs} jobs are selected, and none was submitted: use --since, or "
                        "raise --max-jobs"
                    )

    def _matches(self, event: Mapping[str, Any]) -> bool:
        code = (event.get("error") or {}).get("code")
        return (
            event["ts"] >= self._since_ms
            and (not self._statuses or event.get("status") in self._statuses)
            and (not self._codes or code in self._codes)
        )


class _Retry:
    """One run of the command."""

    def __init__(
        self, settings: Settings, selection: _Selection, events_topic: str, timeout_s: float, *, dry_run: bool
    ) -> None:
        self._settings = settings
        self._selection = selection
        self._events_topic = events_topic
        self._timeout_s = timeout_s
        self._dry_run = dry_run
        self._submitted = 0

    async def run(self) -> bool:
        """Print what happens to each selected job; return whether all of them were submitted."""
        await self._select()
        by_partition: dict[TopicPartition, dict[int, str]] = defaultdict(dict)
        for job_id, source in self._selection.sources.items():
            if source is None:
                _leave(job_id, "it was rejected: see `streamworker dlq replay`")
            elif source.topic not in self._settings.topics.jobs:
                _leave(job_id, f"its job topic {source.topic} is not one of topics.jobs")
            else:
                by_partition[source.topic_partition][source.offset] = job_id
        async with AsyncExitStack() as stack:
            sink = None
            if by_partition and not self._dry_run:
                sink = KafkaSink(self._settings.kafka, self._settings.topics.jobs)
                stack.push_async_callback(sink.stop)
                async with self._waiting("connecting"):
                    await sink.start()
            for partition, jobs in sorted(by_partition.items()):
                await self._submit_again(partition, jobs, sink)
        selected = len(self._selection.sources)
        would = "would be " if self._dry_run else ""
        click.echo(f"{self._submitted} of {selected} selected jobs {would}submitted again", err=True)
        return self._submitted == selected

    async def _select(self) -> None:
        async for record in records_of(self._settings.kafka, self._events_topic, self._timeout_s):
            if record.value is None or ("streamworker-type", b"delta") in record.headers:
                continue
            try:
                event = read_event(record.value)
            except ValueError:
                continue  # `audit` reports it
            self._selection.read(event)

    async def _submit_again(
        self, partition: TopicPartition, jobs: dict[int, str], sink: KafkaSink | None
    ) -> None:
        """Submit the jobs whose records are at these offsets of a partition."""
        async with AsyncExitStack() as stack:
            try:
                async with self._waiting(f"opening {partition.topic}"):
                    log = await stack.enter_async_context(open_log(self._settings.kafka, partition.topic))
            except KafkaRefused as error:
                for job_id in jobs.values():
                    _leave(job_id, str(error))
                return
            missing = dict(jobs)
            records = within(log.at(partition, jobs), f"reading {partition.topic}", self._timeout_s)
            async for record in records:
                job_id = missing.pop(record.at.offset)
                value, reason = _new_value(record, job_id, self._settings.worker.max_job_bytes)
                if reason is None and sink is not None:
                    async with self._waiting(f"writing to {partition.topic}"):
                        reason = await write(sink, _new_record(sink, record, value))
                if reason is not None:
                    _leave(job_id, reason)
                    continue
                self._submitted += 1
                word = "would submit" if self._dry_run else "submitted"
                click.echo(f"{word} {job_id}: the record {record.at} to {partition.topic} again")
            for offset, job_id in missing.items():
                _leave(job_id, f"the record {partition.topic}-{partition.partition}-{offset} is deleted")

    def _waiting(self, action: str) -> AbstractAsyncContextManager[None]:
        return waiting(f"{action} at {self._settings.kafka.bootstrap_servers}", self._timeout_s)


def _leave(job_id: str, reason: str) -> None:
    click.echo(f"left {job_id}: {reason}", err=True)


def _new_value(record: ConsumerRecord, job_id: str, max_bytes: int) -> tuple[bytes, str | None]:
    """Return the value of the new record, and the reason if the job cannot run again."""
    if record.value is None:
        return b"", f"the record {record.at} has no value"
    job = read_job(record, max_bytes=max_bytes)
    if not isinstance(job, Job) or job.job_id != job_id:
        return b"", f"the record {record.at} is another one now: was the topic created again?"
    if job.deadline is not None and job.deadline < time.time():
        return b"", "its deadline has passed"
    if job_id != str(record.at):
        return record.value, None
    # The id was made of the record's coordinates. The new record needs it as a member.
    _, _, members = record.value.partition(b"{")
    return b'{"job_id":' + encode(job_id) + b"," + members, None


def _new_record(sink: KafkaSink, record: ConsumerRecord, value: bytes) -> ProducerRecord:
    headers = (*(header for header in record.headers if header[0] != RERUN), (RERUN, b"1"))
    return ProducerRecord(home_of(sink, record.at, record.key), record.key, value, headers)


def _coordinates(source: Any) -> Coordinates | None:
    match source:
        case {"topic": str(topic), "partition": int(partition), "offset": int(offset)}:
            return Coordinates(topic, partition, offset)
    return None
