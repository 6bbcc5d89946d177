"""`streamworker gateway` and `streamworker gateway key`."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click
import structlog

from streamworker import __version__
from streamworker.app import run_until_signalled
from streamworker.cli.shared import config_file, config_option, run_async, settings_of
from streamworker.config import variables_read
from streamworker.gateway.app import GatewayApp
from streamworker.gateway.keys import SCOPES, new_key, read_keys, rendered, tenant_fault

if TYPE_CHECKING:
    from pathlib import Path

    from streamworker.config import Settings

__all__ = ["gateway"]

log = structlog.get_logger()


@click.group(invoke_without_command=True, short_help="Serve HTTP, event streams and websockets.")
@config_option
@click.pass_context
def gateway(context: click.Context, config: Path | None) -> int:
    """Serve HTTP, event streams and websockets until SIGTERM or SIGINT, which drains; a second signal ends at once."""
    if context.invoked_subcommand is not None:
        context.find_root().obj = config_file(context, config)
        return 0
    settings = settings_of(context, config)

    async def work() -> int:
        app = GatewayApp(settings)
        app.configure_logging()
        _log_start(settings, config_file(context, config))
        return await run_until_signalled(app, "gateway")

    return run_async(work())


def _log_start(settings: Settings, file: Path | None) -> None:
    topics = settings.topics
    log.info(
        "gateway.starting",
        version=__version__,
        brokers=settings.kafka.bootstrap_servers,
        topics={
            "jobs": settings.gateway.topic or topics.jobs[0],
            "events": topics.events,
            "control": topics.control,
        },
        auth=settings.gateway.auth,
        config_file=None if file is None else str(file),
        variables=variables_read(),
    )


@gateway.command(short_help="Make an API key, add it to the keys file, and print it.")
@config_option
@click.argument("name")
@click.option("--tenant", required=True, help='The tenant whose jobs the key may use; "" for every job.')
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPES),
    help="What the key may do; may be repeated; default: everything.",
)
@click.option(
    "--print",
    "is_printed",
    is_flag=True,
    help="Print the entry of the keys file, and the key to standard error, instead of adding it to the file.",
)
@click.pass_context
def key(
    context: click.Context,
    config: Path | None,
    name: str,
    tenant: str,
    scopes: tuple[str, ...],
    is_printed: bool,
) -> None:
    """Make an API key, add it to the keys file (gateway.keys_file), and print it. It cannot be shown again."""
    settings = settings_of(context, config)
    file = settings.gateway.keys_file
    if fault := tenant_fault(tenant, settings.topics.jobs):
        raise click.BadParameter(fault, context, param_hint="--tenant")
    made = new_key()
    try:
        entry = rendered(name, made, tenant, scopes or SCOPES)
    except ValueError as error:
        raise click.BadParameter(str(error), context, param_hint="NAME") from None
    if is_printed:
        click.echo(entry, nl=False)
        click.echo(made, err=True)
        return
    _add(settings, file, name, entry)
    click.echo(f"added key {name} to {file}; it is shown only now:", err=True)
    click.echo(made)


def _add(settings: Settings, file: Path, name: str, entry: str) -> None:
    """Append an entry to the keys file. Raises ConfigurationError, UsageError."""
    separator = ""
    if file.exists():
        known = read_keys(file, settings.topics.jobs)
        if any(name == taken for taken, _ in known.values()):
            raise click.UsageError(
                f"{file} has a key {name} already; remove it first, or choose another name"
            )
        separator = "\n"
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as output:
            output.write(separator + entry)
    except OSError as error:
        raise click.UsageError(f"{file}: {error.strerror}") from None
