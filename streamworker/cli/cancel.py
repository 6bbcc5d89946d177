"""`streamworker cancel`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from streamworker.cli.shared import config_option, quietly, run_async, settings_of
from streamworker.codec.control import write_cancel
from streamworker.kafka.sink import KafkaSink
from streamworker.model import Outgoing

if TYPE_CHECKING:
    from pathlib import Path

    from streamworker.config import Settings

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
    settings = settings_of(context, config)
    quietly()
    run_async(_write(settings, job_id, write_cancel(job_id, reason)))


async def _write(settings: Settings, job_id: str, value: bytes) -> None:
    topic, key = settings.topics.control, job_id.encode()
    sink = KafkaSink(settings.kafka, [topic])
    await sink.start()
    try:
        receipt = sink.receipt()
        sink.publish(Outgoing(sink.partition_for(topic, key), key, value), receipt)
        await receipt.settled()
    finally:
        await sink.stop()
