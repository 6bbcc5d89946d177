"""`streamworker run`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click
import structlog

from streamworker import __version__
from streamworker.app import App, run_until_signalled
from streamworker.cli.shared import config_file, config_option, run_async, settings_of
from streamworker.config import describe, variables_read

if TYPE_CHECKING:
    from pathlib import Path

    from streamworker.config import Settings

__all__ = ["run"]

log = structlog.get_logger()


class _RunCommand(click.Command):
    """A command whose help ends with every setting."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(
            "\nSettings (in the TOML file as [section] name, or as environment variable "
            "STREAMWORKER_<SECTION>__<NAME>):\n\n"
        )
        for path, default, text in describe():
            formatter.write(f"  {path} = {default}\n")
            formatter.write(textwrap.indent(textwrap.fill(text, 100), "      ") + "\n")
        super().format_epilog(context, formatter)


@click.command(cls=_RunCommand, short_help="Run a worker.")
@config_option
@click.pass_context
def run(context: click.Context, config: Path | None) -> int:
    """Run a worker until SIGTERM or SIGINT, which drains it; a second signal ends it at once."""
    settings = settings_of(context, config, needs_keys=True)

    async def work() -> int:
        app = App(settings)
        app.configure_logging()
        _log_start(settings, config_file(context, config))
        return await run_until_signalled(app)

    return run_async(work())


def _log_start(settings: Settings, file: Path | None) -> None:
    topics = settings.topics
    log.info(
        "worker.starting",
        version=__version__,
        group=settings.worker.group_id,
        delivery=settings.worker.delivery,
        brokers=settings.kafka.bootstrap_servers,
        topics={"jobs": topics.jobs, "events": topics.events, "control": topics.control, "dlq": topics.dlq},
        upstreams={name: upstream.base_url for name, upstream in settings.upstreams.items()},
        config_file=None if file is None else str(file),
        variables=variables_read(),
    )
