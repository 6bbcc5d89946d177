"""`streamworker topics create|check`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from streamworker.cli.shared import config_option, quietly, run_async, settings_of, timeout_option, waiting
from streamworker.kafka.topics import faults_of, open_admin, single_partition_notes_of

if TYPE_CHECKING:
    from pathlib import Path

    from streamworker.config import Settings

__all__ = ["topics"]


@click.group()
def topics() -> None:
    """Create or check the topics of the settings."""


@topics.command()
@config_option
@timeout_option
@click.option(
    "--partitions", default=12, show_default=True, type=click.IntRange(1, 10_000), help="Per topic."
)
@click.option(
    "--replicas",
    type=click.IntRange(1, 100),
    help="Replication factor; default: 3, or the number of brokers if lower.",
)
@click.pass_context
def create(
    context: click.Context, config: Path | None, timeout_s: float, partitions: int, replicas: int | None
) -> None:
    """Create the topics that do not exist. Existing topics are not changed."""
    settings = settings_of(context, config)
    quietly()

    async def work() -> None:
        action = f"creating topics at {settings.kafka.bootstrap_servers}"
        async with waiting(action, timeout_s), open_admin(settings) as admin:
            created = await admin.create(partitions=partitions, replicas=replicas)
            described = await admin.describe()
        for name in created:
            click.echo(f"created {name} with {_count(partitions, 'partition')}")
        for name, facts in described.items():
            if name not in created:
                has = f": {_count(facts.partitions, 'partition')}, unchanged" if facts is not None else ""
                click.echo(f"exists  {name}{has}")

    run_async(work())


@topics.command("check")
@config_option
@timeout_option
@click.pass_context
def check_topics(context: click.Context, config: Path | None, timeout_s: float) -> int:
    """Report what is wrong with the topics."""
    settings = settings_of(context, config)
    quietly()
    faults = run_async(_check(settings, timeout_s))
    for fault in faults:
        click.echo(fault, err=True)
    return 1 if faults else 0


async def _check(settings: Settings, timeout_s: float) -> list[str]:
    action = f"reading the topics at {settings.kafka.bootstrap_servers}"
    async with waiting(action, timeout_s), open_admin(settings) as admin:
        found = await admin.describe()
    for name, facts in found.items():
        if facts is not None:
            size = f", records up to {facts.max_message_bytes} bytes" if facts.max_message_bytes else ""
            parts = f"{_count(facts.partitions, 'partition')}, {_count(facts.replicas, 'replica')}"
            click.echo(f"ok      {name}: {parts}{size}")
    for note in single_partition_notes_of(settings, found):
        click.echo(f"note    {note}")
    return faults_of(settings, found)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
