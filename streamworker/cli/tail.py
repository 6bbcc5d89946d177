"""`streamworker tail`."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, Any

import click

from streamworker.cli.shared import config_option, quietly, run_async, settings_of
from streamworker.kafka.log import open_log
from streamworker.reader import EventReader, Notice
from streamworker.stream.usage import generated_text
from streamworker.wire.event import read_event

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from streamworker.config import Settings
    from streamworker.model import ConsumerRecord
    from streamworker.reader import Reading

__all__ = ["tail"]

_SILENCE_S = 3.0


@click.command()
@config_option
@click.argument("job_id")
@click.option(
    "--json", "as_json", is_flag=True, help="Print events, one JSON object per line, instead of text."
)
@click.option("--choice", default=0, show_default=True, help="Which choice's text to print.")
@click.option("--topic", help="Events topic; default: topics.events. For a job with reply_to, that topic.")
@click.pass_context
def tail(
    context: click.Context, config: Path | None, job_id: str, as_json: bool, choice: int, topic: str | None
) -> int:
    """Print a job's text as it comes, from its beginning, until it ends.

    Works as well after the job has ended. Exits with 0 if the job completed, with 1 if not.
    """
    settings = settings_of(context, config)
    quietly()
    show = _show_json if as_json else _text_shower(choice)
    status = run_async(_follow(settings, topic or settings.topics.events, job_id, show))
    return 0 if status == "completed" else 1


async def _follow(
    settings: Settings, topic: str, job_id: str, show: Callable[[ConsumerRecord, Reading], None]
) -> str:
    key = job_id.encode()
    reader = EventReader()
    silence = f"no event of {job_id} yet; waiting (Ctrl-C ends)"
    hint = asyncio.get_running_loop().call_later(_SILENCE_S, lambda: click.echo(silence, err=True))
    async with open_log(settings.kafka, topic) as log:
        home = log.partition_for(key)
        # A job that was replayed, or an id that was used again, has ended more than once: what counts is the last end.
        known = [record.at.offset async for record in log.snapshot([home]) if record.key == key]
        async for record in log.follow([home]):
            if record.key != key or record.value is None:
                continue
            hint.cancel()
            for reading in reader.read(read_event(record.value)):
                show(record, reading)
                has_ended = reading.notice is Notice.VALID and reading.event["type"] == "usage"
                if has_ended and record.at.offset >= max(known, default=-1):
                    return str(reading.event["status"])
    raise AssertionError("a log is followed for ever")


def _show_json(record: ConsumerRecord, reading: Reading) -> None:
    if reading.notice is Notice.VALID and record.value is not None:
        _write(record.value.decode() + "\n")


def _text_shower(choice: int) -> Callable[[ConsumerRecord, Reading], None]:
    def show(_: ConsumerRecord, reading: Reading) -> None:
        event = reading.event
        match reading.notice:
            case Notice.VALID if event["type"] == "delta" and event["choice"] == choice:
                _write(generated_text(event["delta"])[0])
            case Notice.VALID if event["type"] == "usage":
                _write("\n")
                click.echo(_summary(event), err=True)
            case Notice.SUPERSEDED:
                click.echo("\n[the job begins anew]", err=True)
            case Notice.AFTER_END if event["type"] == "started":
                click.echo("[the job was run again]", err=True)
            case Notice.GAP:
                click.echo(f"\n[events are missing: {reading.detail}]", err=True)

    return show


def _summary(event: Mapping[str, Any]) -> str:
    parts = [str(event["status"])]
    if error := event.get("error"):
        parts.append(f"{error['code']}: {error['message']}")
    if usage := event.get("usage"):
        counts = [f"{name} {usage[name]}" for name in ("prompt_tokens", "completion_tokens") if name in usage]
        parts.append(f"{', '.join(counts)} ({event['usage_source']})")
    return "[" + " · ".join(parts) + "]"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
