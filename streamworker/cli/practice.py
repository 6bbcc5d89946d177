"""`streamworker practice-upstream`."""

from __future__ import annotations

import asyncio
import signal

import click

from streamworker.cli.shared import run_async
from streamworker.errors import ConfigurationError
from streamworker.practice import PracticeUpstream, serve

__all__ = ["practice_upstream"]


@click.command("practice-upstream")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0 takes a free one."
)
@click.option("--api-key", envvar="PRACTICE_UPSTREAM_API_KEY", help="Refuse calls without this bearer key.")
def practice_upstream(host: str, port: int, api_key: str | None) -> None:
    """Serve an OpenAI-compatible upstream for practice: the model's name chooses what it does.

    \b
    practice                          a short, well-behaved stream
    practice?deltas=200&pace_ms=20    longer and slower
    practice?break_after=5            the connection is reset after five deltas
    practice?status=429&retry_after=2 an error status

    Every option is in the documentation of streamworker.practice.script.
    """

    def started(upstream: PracticeUpstream) -> None:
        click.echo(f"practice upstream at {upstream.base_url}", err=True)

    async def work() -> None:
        task = asyncio.ensure_future(serve(host, port, api_key=api_key, started=started))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            return
        except OSError as error:
            raise ConfigurationError([f"--port: cannot listen on {host}:{port}: {error.strerror}"]) from error

    run_async(work())
