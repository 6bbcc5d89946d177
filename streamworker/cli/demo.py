"""`streamworker demo`."""

from __future__ import annotations

import asyncio
import signal

import click

from streamworker.cli.extras import needs_extra
from streamworker.cli.shared import run_async

__all__ = ["demo"]


@click.command()
@click.option("-m", "--model", help="Model to call, if the environment names an upstream.")
def demo(model: str | None) -> int:
    """Run broker, practice upstream, worker and several jobs on this machine, and show them side by side.

    With STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS, or STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL and a key in
    STREAMWORKER_UPSTREAMS__DEFAULT__API_KEY_ENV, the demo uses those instead.
    """
    with needs_extra("streamworker demo", "demo"):
        from streamworker.demo.play import play  # noqa: PLC0415 - needs the demo extra

    async def work() -> int:
        task = asyncio.ensure_future(play(model=model))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            click.echo("\nstopped; every process has ended", err=True)
            return 130

    return run_async(work())
