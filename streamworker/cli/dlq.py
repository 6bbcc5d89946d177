"""`streamworker dlq list|replay`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from streamworker.cli.records import home_of, records_of, write
from streamworker.cli.shared import config_option, quietly, run_async, settings_of, timeout_option, waiting
from streamworker.kafka.sink import KafkaSink
from streamworker.wire.deadletter import DeadLetter, read_dead_letter, replay_of
from streamworker.wire.json import encode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from streamworker.config import Settings
    from streamworker.model import ConsumerRecord

__all__ = ["dlq"]


@click.group()
def dlq() -> None:
    """List dead letters, and run their jobs again."""


def _code_option(command: Any) -> Any:
    return click.option(
        "--code", "codes", multiple=True, help="Only dead letters with this error code; may be repeated."
    )(command)


@dlq.command("list")
@config_option
@timeout_option
@_code_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.pass_context
def list_letters(
    context: click.Context, config: Path | None, timeout_s: float, codes: Sequence[str], as_json: bool
) -> None:
    """Print every dead letter with its place, time, error and job."""
    settings = settings_of(context, config)
    quietly()

    async def work() -> None:
        seen = printed = 0
        async for record, letter in _letters(settings, timeout_s):
            seen += 1
            if not codes or letter.code in codes:
                printed += 1
                click.echo(encode(_members(record, letter)).decode() if as_json else _line(record, letter))

        if not printed:
            with_code = f" with code {' or '.join(codes)}, of {seen}" if seen else ""
            click.echo(f"{settings.topics.dlq} has no dead letter{with_code}", err=True)

    run_async(work())


@dlq.command()
@config_option
@timeout_option
@click.option(
    "--at",
    "places",
    multiple=True,
    metavar="TOPIC-PARTITION-OFFSET",
    help="Replay this dead letter, named as in `list`; may be repeated.",
)
@_code_option
@click.option("--all", "everything", is_flag=True, help="Replay every dead letter.")
@click.option("--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
@click.option(
    "--max-replays",
    default=3,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Do not replay a job that was replayed this number of times.",
)
@click.pass_context
def replay(
    context: click.Context,
    config: Path | None,
    timeout_s: float,
    places: Sequence[str],
    codes: Sequence[str],
    everything: bool,
    dry_run: bool,
    max_replays: int,
) -> int:
    """Write the job records of dead letters to their job topics again. The dead letters stay where they are.

    Each job is printed when it is written. If the command is interrupted, or run twice, jobs are written twice: use
    --at for the remaining ones. A job with a job_id gets a new run under the same id; a job without one gets a new id.

    Exits with 1 if a selected dead letter could not be replayed.
    """
    if not (places or codes or everything):
        raise click.UsageError("--at, --code or --all is required")
    settings = settings_of(context, config)
    quietly()
    wanted = _Wanted(frozenset(places), frozenset(codes), everything)
    return 0 if run_async(_replay(settings, wanted, max_replays, timeout_s, dry_run=dry_run)) else 1


class _Wanted(NamedTuple):
    places: frozenset[str]
    codes: frozenset[str]
    everything: bool

    def includes(self, record: ConsumerRecord, letter: DeadLetter) -> bool:
        return self.everything or str(record.at) in self.places or letter.code in self.codes


async def _replay(
    settings: Settings, wanted: _Wanted, max_replays: int, timeout_s: float, *, dry_run: bool
) -> bool:
    """Return whether every selected dead letter was replayed."""
    # All are selected before the first one is written: a job that fails again at once must not be selected twice.
    letters = _letters(settings, timeout_s)
    chosen = [(record, letter) async for record, letter in letters if wanted.includes(record, letter)]
    unknown = sorted(wanted.places - {str(record.at) for record, _ in chosen})
    for place in unknown:
        click.echo(f"left    {place}: there is no such dead letter", err=True)
    done = 0
    sink = KafkaSink(settings.kafka, settings.topics.jobs)
    async with waiting(f"connecting to {settings.kafka.bootstrap_servers}", timeout_s):
        await sink.start()
    try:
        for record, letter in chosen:
            reason = _reason_to_leave(settings, record, letter, max_replays)
            if reason is None and not dry_run:
                async with waiting(f"writing to {letter.source.topic}", timeout_s):
                    home = home_of(sink, letter.source, record.key)
                    reason = await write(sink, replay_of(record, home))
            if reason is None:
                done += 1
                word = "would replay" if dry_run else "replayed"
                click.echo(f"{word} {record.at}: job {letter.job_id} to {letter.source.topic}")
            else:
                click.echo(f"left    {record.at}: {reason}", err=True)
    finally:
        await sink.stop()
    click.echo(f"{done} of {len(chosen)} dead letters {'would be ' if dry_run else ''}replayed", err=True)
    return done == len(chosen) and not unknown


def _reason_to_leave(
    settings: Settings, record: ConsumerRecord, letter: DeadLetter, max_replays: int
) -> str | None:
    if letter.source.topic not in settings.topics.jobs:
        return f"its job topic {_printable(letter.source.topic)} is not one of topics.jobs"
    if record.value is None:
        return f"its value was too large for a dead letter; the job record is at {letter.source} until retention deletes it"
    if letter.replays >= max_replays:
        return f"it was replayed {letter.replays} times and failed each time; --max-replays allows more"
    return None


async def _letters(settings: Settings, timeout_s: float) -> AsyncIterator[tuple[ConsumerRecord, DeadLetter]]:
    async for record in records_of(settings.kafka, settings.topics.dlq, timeout_s):
        try:
            yield record, read_dead_letter(record)
        except ValueError as error:
            click.echo(f"skipped {record.at}: it is not a valid dead letter: {error}", err=True)


def _members(record: ConsumerRecord, letter: DeadLetter) -> dict[str, Any]:
    return {
        "at": str(record.at),
        "ts": record.timestamp,
        "job_id": letter.job_id,
        "code": letter.code,
        "message": letter.message,
        "source": dict(zip(("topic", "partition", "offset"), letter.source, strict=True)),
        "source_ts": letter.timestamp,
        "replays": letter.replays,
        "bytes": None if record.value is None else len(record.value),
    }


def _line(record: ConsumerRecord, letter: DeadLetter) -> str:
    when = datetime.fromtimestamp(record.timestamp / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    replays = f" (replayed {letter.replays} times)" if letter.replays else ""
    return f"{record.at}  {when}  {_printable(letter.code)}  {letter.job_id}{replays}  {_printable(letter.message)}"


def _printable(text: str) -> str:
    """Replace control characters, which a terminal would execute: a job's member names are the sender's text."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)
