"""`streamworker dlq list|replay`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from streamworker.cli.shared import config_option, quietly, run_async, settings_of
from streamworker.errors import RecordTooLarge
from streamworker.kafka.log import open_log
from streamworker.kafka.sink import KafkaSink
from streamworker.model import TopicPartition
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
    """Look at dead letters, and run their jobs again."""


def _code_option(command: Any) -> Any:
    return click.option(
        "--code", "codes", multiple=True, help="Only those with this error code; may be repeated."
    )(command)


@dlq.command("list")
@config_option
@_code_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.pass_context
def list_letters(context: click.Context, config: Path | None, codes: Sequence[str], as_json: bool) -> None:
    """Show the dead letters that are there: where, when, why, and of which job."""
    settings = settings_of(context, config)
    quietly()

    async def work() -> None:
        async for record, letter in _letters(settings):
            if not codes or letter.code in codes:
                click.echo(encode(_members(record, letter)).decode() if as_json else _line(record, letter))

    run_async(work())


@dlq.command()
@config_option
@click.option(
    "--at",
    "places",
    multiple=True,
    metavar="TOPIC-PARTITION-OFFSET",
    help="This one, as `list` names it; may be repeated.",
)
@_code_option
@click.option("--all", "everything", is_flag=True, help="Every one.")
@click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@click.option(
    "--max-replays",
    default=3,
    show_default=True,
    type=click.IntRange(1, 1000),
    help="Leave alone what was replayed so often.",
)
@click.pass_context
def replay(
    context: click.Context,
    config: Path | None,
    places: Sequence[str],
    codes: Sequence[str],
    everything: bool,
    dry_run: bool,
    max_replays: int,
) -> int:
    """Write dead letters back to their job topics, as they were. They stay in the dead-letter topic, too.

    Each is told when it is written. Interrupted, or run again, it writes again what it wrote: name with --at what is
    left. A job with a job_id runs under the same id: readers follow its new `started`; one without gets a new id.

    Exits with 1 if one that was asked for could not be replayed.
    """
    if not (places or codes or everything):
        raise click.UsageError("say which: --at, --code or --all")
    settings = settings_of(context, config)
    quietly()
    wanted = _Wanted(frozenset(places), frozenset(codes), everything)
    return 0 if run_async(_replay(settings, wanted, max_replays, dry_run=dry_run)) else 1


class _Wanted(NamedTuple):
    places: frozenset[str]
    codes: frozenset[str]
    everything: bool

    def includes(self, record: ConsumerRecord, letter: DeadLetter) -> bool:
        return self.everything or str(record.at) in self.places or letter.code in self.codes


async def _replay(settings: Settings, wanted: _Wanted, max_replays: int, *, dry_run: bool) -> bool:
    """Return whether all that was asked for was done."""
    # All of them are chosen before the first is written: one that dies again at once must not be met again.
    chosen = [
        (record, letter) async for record, letter in _letters(settings) if wanted.includes(record, letter)
    ]
    unknown = sorted(wanted.places - {str(record.at) for record, _ in chosen})
    for place in unknown:
        click.echo(f"left    {place}: there is no such dead letter", err=True)
    done = 0
    sink = KafkaSink(settings.kafka, settings.topics.jobs)
    await sink.start()
    try:
        for record, letter in chosen:
            reason = _reason_to_leave(settings, record, letter, max_replays)
            if reason is None and not dry_run:
                reason = await _write(sink, record, letter)
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
        return (
            f"its value was too large to be kept; the job lies at {letter.source}, if it is not deleted yet"
        )
    if letter.replays >= max_replays:
        return f"it was replayed {letter.replays} times and died each time; --max-replays allows more"
    return None


async def _write(sink: KafkaSink, record: ConsumerRecord, letter: DeadLetter) -> str | None:
    """Write one and wait for it. Return why it could not be, if so."""
    key = record.key if record.key is not None else str(letter.source).encode()
    receipt = sink.receipt()
    sink.publish(replay_of(record, sink.partition_for(letter.source.topic, key)), receipt)
    try:
        await receipt.settled()
    except RecordTooLarge as error:
        return str(error)
    return None


async def _letters(settings: Settings) -> AsyncIterator[tuple[ConsumerRecord, DeadLetter]]:
    topic = settings.topics.dlq
    async with open_log(settings.kafka, topic) as log:
        async for record in log.snapshot([TopicPartition(topic, number) for number in log.partitions]):
            try:
                yield record, read_dead_letter(record)
            except ValueError as error:
                click.echo(f"passed over {record.at}: no dead letter of ours: {error}", err=True)


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
    """Show a terminal nothing that it would obey: member names of a job are its sender's."""
    return "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in text)
