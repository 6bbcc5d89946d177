"""The command tree with `--config`, and the conversion of errors to messages and exit codes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamworker import __version__
from streamworker.cli.audit import audit
from streamworker.cli.batch import batch
from streamworker.cli.cancel import cancel
from streamworker.cli.check import check
from streamworker.cli.demo import demo
from streamworker.cli.dlq import dlq
from streamworker.cli.gateway import gateway
from streamworker.cli.practice import practice_upstream
from streamworker.cli.retry import retry
from streamworker.cli.run import run
from streamworker.cli.schema import schema
from streamworker.cli.submit import submit
from streamworker.cli.tail import tail
from streamworker.cli.topics import topics
from streamworker.errors import ConfigurationError, StreamworkerError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["cli", "run_command"]

FAILED, BAD_USAGE = 1, 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
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


for command in (
    run,
    gateway,
    demo,
    submit,
    tail,
    cancel,
    retry,
    batch,
    dlq,
    topics,
    check,
    audit,
    schema,
    practice_upstream,
):
    cli.add_command(command)


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
