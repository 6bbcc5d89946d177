"""`streamworker run`."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

import click

from streamworker.app import App, run_until_signalled
from streamworker.cli.shared import config_option, run_async, settings_of
from streamworker.config import describe

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["run"]


class _RunCommand(click.Command):
    """Names every setting at the end of its help."""

    def format_epilog(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write(
            "\nSettings (in the TOML file as [section] name, or as STREAMWORKER_<SECTION>__<NAME>):\n\n"
        )
        for path, default, text in describe():
            formatter.write(f"  {path} = {default}\n")
            formatter.write(textwrap.indent(textwrap.fill(text, 100), "      ") + "\n")
        super().format_epilog(context, formatter)


@click.command(cls=_RunCommand)
@config_option
@click.pass_context
def run(context: click.Context, config: Path | None) -> int:
    """Run a worker until SIGTERM or SIGINT, which drain it; a second signal ends it at once."""
    settings = settings_of(context, config, needs_keys=True)

    async def work() -> int:
        app = App(settings)
        app.configure_logging()
        return await run_until_signalled(app)

    return run_async(work())
