"""`streamworker tail`."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import click

from streamworker.cli.shared import (
    HINT_S,
    config_option,
    quietly,
    run_async,
    settings_of,
    timeout_option,
    waiting,
    within,
)
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


@click.command()
@config_option
@timeout_option
@click.argument("job_id")
@click.option(
    "--json", "as_json", is_flag=True, help="Print events, one JSON object per line, instead of text."
)
@click.option("--choice", default=0, show_default=True, help="Index of the choice to print.")
@click.option("--topic", help="Events topic; default: topics.events. For a job with reply_to, that topic.")
@click.pass_context
def tail(
    context: click.Context,
    config: Path | None,
    timeout_s: float,
    job_id: str,
    as_json: bool,
    choice: int,
    topic: str | None,
) -> int:
    """Print a job's text while it is generated, from its beginning, until the job ends.

    It can also be used after the job has ended. Exits with 0 if the job completed, else with 1.
    """
    settings = settings_of(context, config)
    quietly()
    show = _show_json if as_json else _text_shower(choice)
    status = run_async(_follow(settings, topic or settings.topics.events, job_id, show, timeout_s))
    return 0 if status == "completed" else 1


async def _follow(
    settings: Settings,
    topic: str,
    job_id: str,
    show: Callable[[ConsumerRecord, Reading], None],
    timeout_s: float,
) -> str:
    key = job_id.encode()
    reader = EventReader()
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        async with waiting(f"opening {topic} at {settings.kafka.bootstrap_servers}", timeout_s):
            log = await stack.enter_async_context(open_log(settings.kafka, topic))
        home = log.partition_for(key)
        # A job with several runs has several terminal events: the last one counts.
        records = within(log.snapshot([home]), f"reading {topic}", timeout_s)
        known = [record.at.offset async for record in records if record.key == key]
        silence = f"{topic} has no event of {job_id} yet; waiting (Ctrl-C ends)"
        hint = loop.call_later(HINT_S, lambda: click.echo(silence, err=True))
        async for record in log.follow([home]):
            if record.key != key or record.value is None:
                continue
            hint.cancel()
            for reading in reader.read(read_event(record.value)):
                show(record, reading)
                has_ended = reading.notice is Notice.VALID and reading.event["type"] == "usage"
                if has_ended and record.at.offset >= max(known, default=-1):
                    return str(reading.event["status"])
    raise AssertionError("following a log never ends")


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
                click.echo("\n[a new attempt begins: ignore the text above]", err=True)
            case Notice.NEW_RUN:
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
