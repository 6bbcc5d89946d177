"""`streamworker demo`."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Final

import click
from click.core import ParameterSource

from streamworker.cli.extras import needs_extra
from streamworker.cli.shared import run_async
from streamworker.config import PREFIX

__all__ = ["demo"]

UPSTREAM_VARIABLE: Final = f"{PREFIX}UPSTREAMS__DEFAULT__BASE_URL"


@click.command(short_help="Run two workers and jobs on this machine; kill a worker.")
@click.option("-m", "--model", help="Model to call, if the environment names an upstream.")
@click.option("--stay", is_flag=True, help="Keep everything running after the account, until Ctrl-C.")
@click.pass_context
def demo(context: click.Context, model: str | None, *, stay: bool) -> int:
    """Run a broker, a practice upstream, two workers and several jobs on this machine, and kill one of the workers.

    In a terminal the jobs are shown side by side, else as one line per event. A configured upstream is not called twice: with
    one, no worker is killed.

    With STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS, or STREAMWORKER_UPSTREAMS__DEFAULT__BASE_URL and a key in
    STREAMWORKER_UPSTREAMS__DEFAULT__API_KEY_ENV, the demo uses those instead.
    """
    _refuse_what_has_no_effect(context, model)
    with needs_extra("streamworker demo", "demo"):
        from streamworker.demo.play import play  # noqa: PLC0415 - needs the demo extra

    async def work() -> int:
        task = asyncio.ensure_future(play(model=model, stays=stay))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            click.echo("\nstopped; every process has ended", err=True)
            return 130

    return run_async(work())


def _refuse_what_has_no_effect(context: click.Context, model: str | None) -> None:
    """Refuse options that the demo would ignore. Raises UsageError."""
    if context.find_root().get_parameter_source("config") is ParameterSource.COMMANDLINE:
        raise click.UsageError("the demo reads no configuration file, only the variables that --help names")
    if model and not os.environ.get(UPSTREAM_VARIABLE):
        raise click.UsageError(f"--model is for an upstream of your own: set {UPSTREAM_VARIABLE}")
