"""`streamworker practice-upstream`."""

from __future__ import annotations

import asyncio
import signal
from typing import Any

import click

from streamworker.cli.shared import run_async
from streamworker.errors import ConfigurationError
from streamworker.practice import Limits, Mishaps, PracticeUpstream, script, serve

__all__ = ["practice_upstream"]

_SHARE = click.FloatRange(0, 1)
_COUNT = click.IntRange(1)


class _PracticeCommand(click.Command):
    """A command whose help ends with the grammar of model names."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write("\n" + (script.__doc__ or "").strip() + "\n")
        super().format_epilog(context, formatter)


@click.command(
    "practice-upstream", cls=_PracticeCommand, short_help="Serve an OpenAI-compatible upstream for tests."
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=8000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0 selects a free one.",
)
@click.option("--api-key", envvar="PRACTICE_UPSTREAM_API_KEY", help="Refuse calls without this bearer key.")
@click.option("--max-streams", type=_COUNT, help="Streams open at once; further calls are answered 429.")
@click.option(
    "--requests-per-minute", type=_COUNT, help="Calls within 60 seconds; further calls are answered 429."
)
@click.option(
    "--tokens-per-minute",
    type=_COUNT,
    help="Tokens of prompts and answers within 60 seconds; then calls are answered 429.",
)
@click.option("--limited", default=0.0, type=_SHARE, help="Share of calls answered 429 at random, 0 to 1.")
@click.option("--stalled", default=0.0, type=_SHARE, help="Share of streams that stall, 0 to 1.")
@click.option("--broken", default=0.0, type=_SHARE, help="Share of streams that are reset, 0 to 1.")
@click.option("--seed", default=0, show_default=True, help="Seed of the random faults.")
@click.option(
    "--dies-after-s",
    type=click.FloatRange(0),
    help="Reset all connections and refuse new ones after this time ...",
)
@click.option(
    "--dies-for-s", default=10.0, show_default=True, type=click.FloatRange(0), help="... for this long."
)
def practice_upstream(
    host: str,
    port: int,
    api_key: str | None,
    max_streams: int | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    dies_after_s: float | None,
    dies_for_s: float,
    **mishaps: Any,
) -> None:
    """Serve an OpenAI-compatible upstream for tests: the model name selects what it does.

    \b
    practice                          a short stream without faults
    practice?deltas=200&pace_ms=20    longer and slower
    practice?break_after=5            the connection is reset after five deltas
    practice?status=429&retry_after=2 an error status
    practice?shape=azure&reasoning    another provider's chunks

    GET /calls returns what was sent, and which calls exceeded a limit.
    """
    try:
        chances = Mishaps(**mishaps)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    limits = Limits(
        streams=max_streams, requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute
    )
    upstream = PracticeUpstream(
        api_key=api_key, limits=limits, mishaps=chances, maxlen=1_000, content_limit=0
    )

    def started(upstream: PracticeUpstream) -> None:
        click.echo(f"practice upstream at {upstream.base_url}", err=True)

    async def work() -> None:
        serving = serve(
            upstream, host, port, started=started, dies_after_s=dies_after_s, dies_for_s=dies_for_s
        )
        task = asyncio.ensure_future(serving)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            return
        except OSError as error:
            raise ConfigurationError([f"--port: cannot listen on {host}:{port}: {error.strerror}"]) from error

    run_async(work())
