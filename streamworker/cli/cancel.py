"""`streamworker cancel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from streamworker.cli.shared import (
    check_job_id,
    config_option,
    quietly,
    run_async,
    settings_of,
    timeout_option,
    waiting,
)
from streamworker.client import Client

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
    check_job_id(job_id)
    settings = settings_of(context, config)
    quietly()
    topic = settings.topics.control

    async def work() -> None:
        action = f"writing to {topic} at {settings.kafka.bootstrap_servers}"
        async with waiting(action, timeout_s), Client(settings, is_lazy=True) as client:
            await client.job(job_id).cancel(reason)

    run_async(work())
    click.echo(f"cancellation of {job_id} written", err=True)
