"""`streamworker cancel`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from streamworker.cli.shared import config_option, quietly, run_async, settings_of, timeout_option, waiting
from streamworker.client import Client
from streamworker.wire.job import JOB_ID_PATTERN

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["cancel"]


@click.command()
@config_option
@timeout_option
@click.argument("job_id")
@click.option("--reason", help="Text for the job's terminal event.")
@click.pass_context
def cancel(
    context: click.Context, config: Path | None, timeout_s: float, job_id: str, reason: str | None
) -> None:
    """Cancel a job that waits or runs. Its terminal event counts what was generated so far.

    A job that has ended does not change, and a job that is submitted later under the same id is not cancelled.
    """
    if not re.fullmatch(JOB_ID_PATTERN, job_id):
        raise click.UsageError(f"{job_id!r} is not a valid job id: 1 to 200 of A-Z a-z 0-9 . _ : -")
    settings = settings_of(context, config)
    quietly()
    topic = settings.topics.control

    async def work() -> None:
        action = f"writing to {topic} at {settings.kafka.bootstrap_servers}"
        async with waiting(action, timeout_s), Client(settings, is_lazy=True) as client:
            await client.job(job_id).cancel(reason)

    run_async(work())
    click.echo(f"cancellation of {job_id} written", err=True)
