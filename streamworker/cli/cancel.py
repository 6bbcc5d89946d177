"""`streamworker cancel`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from streamworker.cli.shared import config_option, quietly, run_async, settings_of
from streamworker.kafka.sink import publish
from streamworker.wire.control import write_cancel
from streamworker.wire.job import JOB_ID_PATTERN

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["cancel"]


@click.command()
@config_option
@click.argument("job_id")
@click.option("--reason", help="Told in the job's terminal event.")
@click.pass_context
def cancel(context: click.Context, config: Path | None, job_id: str, reason: str | None) -> None:
    """End a job, wherever it is: it gets its terminal event with what it had so far.

    A job that has ended is left alone, and so is one that is submitted later under the same id.
    """
    if not re.fullmatch(JOB_ID_PATTERN, job_id):
        raise click.UsageError(f"{job_id!r} is no job id: 1 to 200 of A-Z a-z 0-9 . _ : -")
    settings = settings_of(context, config)
    quietly()
    value = write_cancel(job_id, reason)
    run_async(publish(settings.kafka, settings.topics.control, [(job_id.encode(), value)]))
    click.echo(f"cancellation of {job_id} written", err=True)
