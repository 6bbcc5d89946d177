"""The command tree with `--config`, and the conversion of errors to messages and exit codes."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamworker import __version__
from streamworker.errors import ConfigurationError, StreamworkerError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["COMMANDS", "cli", "run_command"]

FAILED, BAD_USAGE = 1, 2


COMMANDS = {
    "run": "run",
    "gateway": "gateway",
    "demo": "demo",
    "submit": "submit",
    "tail": "tail",
    "cancel": "cancel",
    "retry": "retry",
    "batch": "batch",
    "dlq": "dlq",
    "topics": "topics",
    "check": "check",
    "audit": "audit",
    "schema": "schema",
    "practice-upstream": "practice",
}
"""The commands and their modules in `streamworker.cli`, where each is a function of the command's name."""


class _Commands(click.Group):
    """Imports a command's module when the command is used: all modules take half a second of processor time."""

    def list_commands(self, _: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, _: click.Context, name: str) -> click.Command | None:
        if (module := COMMANDS.get(name)) is None:
            return None
        command: click.Command = getattr(import_module(f"streamworker.cli.{module}"), name.replace("-", "_"))
        return command

    def resolve_command(
        self, context: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command. Raises UsageError with the name that a misspelt one resembles."""
        try:
            return super().resolve_command(context, args)
        except click.UsageError as error:
            close = get_close_matches(args[0], COMMANDS, 1)
            raise click.UsageError(
                error.message + (f" Did you mean {close[0]!r}?" if close else ""), context
            ) from None


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(__version__, prog_name="streamworker")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="STREAMWORKER_CONFIG",
    help="TOML file with the settings. Environment variables override it.",
)
@click.pass_context
def cli(context: click.Context, config: Path | None) -> None:
    """Event-stream fan-out worker: prompt jobs from Kafka in, live deltas and one terminal usage event per job out."""
    context.obj = config


def run_command(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 done, 1 failed, 2 bad usage or configuration."""
    try:
        code: Any = cli.main(arguments, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(130)
    except ConfigurationError as error:
        click.echo(str(error), err=True)
        sys.exit(BAD_USAGE)
    except StreamworkerError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(FAILED)
    except BrokenPipeError:  # the program that reads the output has ended
        sys.stderr.close()
        sys.exit(0)
    sys.exit(code if isinstance(code, int) else 0)
