"""`streamworker tail`."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import click

from streamworker.cli.shared import (
    check_job_id,
    config_option,
    hint,
    parse_since,
    quietly,
    run_async,
    settings_of,
    timeout_option,
    waiting,
)
from streamworker.client import Client, Delta, Ended, Restarted
from streamworker.client.ids import submitted_ms
from streamworker.stream.usage import generated_text

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from streamworker.client import Event
    from streamworker.config import Settings

__all__ = ["tail"]

_BEFORE_FIRST_DELTA: Final = (
    "the job has started and has no delta yet: its upstream is slow, limits its calls or is held, as the worker's log and "
    "/readyz say; waiting (Ctrl-C ends)"
)
_AFTER_DELTA: Final = (
    "\nno event for a while: the upstream pauses, or the worker has died; waiting (Ctrl-C ends)"
)


@click.command(short_help="Print a job's text while it is generated.")
@config_option
@timeout_option
@click.argument("job_id")
@click.option(
    "--json", "as_json", is_flag=True, help="Print events, one JSON object per line, instead of text."
)
@click.option("--choice", default=0, show_default=True, help="Index of the choice to print.")
@click.option("--topic", help="Events topic; default: topics.events. For a job with reply_to, that topic.")
@click.option(
    "--since",
    "since_ms",
    callback=parse_since,
    metavar="TIME",
    help="Read the topic from this time on: 90m, 2h, 3d, or RFC 3339. Default: the time in the job's id (UUID 7), else "
    "the beginning of the topic.",
)
@click.pass_context
def tail(
    context: click.Context,
    config: Path | None,
    timeout_s: float,
    job_id: str,
    as_json: bool,
    choice: int,
    topic: str | None,
    since_ms: float,
) -> int:
    """Print a job's text while it is generated, from its beginning, until the job ends.

    It can also be used after the job has ended. Exits with 0 if the job completed, else with 1.
    """
    check_job_id(job_id)
    settings = settings_of(context, config)
    quietly()
    has_time = since_ms or submitted_ms(job_id) is None
    since = datetime.fromtimestamp(since_ms / 1000, UTC) if has_time else None
    show = _show_json if as_json else _TextPrinter(choice).show
    status = run_async(_follow(settings, topic or settings.topics.events, job_id, since, show, timeout_s))
    return 0 if status == "completed" else 1


async def _follow(
    settings: Settings,
    topic: str,
    job_id: str,
    since: datetime | None,
    show: Callable[[Event], None],
    timeout_s: float,
) -> str:
    async with Client(settings, is_lazy=True) as client:
        stream = client.job(job_id, since=since, reply_to=topic).events()
        async with waiting(f"opening {topic} at {settings.kafka.bootstrap_servers}", timeout_s):
            await stream.open()
        with hint(f"{topic} has no event of {job_id} yet; waiting (Ctrl-C ends)"):
            event = await anext(stream)
        show(event)
        said: set[tuple[str, bool]] = set()
        while not isinstance(event, Ended):
            event = await _next(stream, event, said)
            show(event)
    return event.status


async def _next(stream: AsyncIterator[Event], last: Event, said: set[tuple[str, bool]]) -> Event:
    """Return the next event. In each attempt one wait for the first delta and one wait after it is explained."""
    wait = (last.attempt, isinstance(last, Delta))
    if wait in said:
        return await anext(stream)
    with hint(_AFTER_DELTA if wait[1] else _BEFORE_FIRST_DELTA) as printed:
        event = await anext(stream)
    if printed.is_set():
        said.add(wait)
    return event


def _show_json(event: Event) -> None:
    _write(event.json() + "\n")


class _TextPrinter:
    """Prints the text of one choice, and to standard error what else happens."""

    def __init__(self, choice: int) -> None:
        self._choice = choice
        self._next_seq = 0

    def show(self, event: Event) -> None:
        """Print one event."""
        if event.seq > self._next_seq:
            click.echo(f"\n[events are missing: seq {event.seq} instead of {self._next_seq}]", err=True)
        self._next_seq = event.seq + 1
        match event:
            case Delta() if event.choice == self._choice:
                _write(generated_text(event.delta)[0])
            case Restarted(cause="new"):
                click.echo("\n[the job was run again: ignore the text above]", err=True)
            case Restarted():
                click.echo("\n[a new attempt begins: ignore the text above]", err=True)
            case Ended():
                _write("\n")
                click.echo(_summary(event), err=True)


def _summary(event: Ended) -> str:
    parts = [event.status]
    if error := event.error:
        parts.append(f"{error['code']}: {error['message']}")
    if usage := event.usage:
        counts = [f"{name} {usage[name]}" for name in ("prompt_tokens", "completion_tokens") if name in usage]
        parts.append(f"{', '.join(counts)} ({event.usage_source})")
    return "[" + " · ".join(parts) + "]"


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
