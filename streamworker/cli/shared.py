"""What several commands need."""

from __future__ import annotations

import asyncio
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from streamworker.config import Settings, load
from streamworker.telemetry.logging import configure_logging

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

__all__ = ["config_option", "quietly", "run_async", "settings_of"]

T = TypeVar("T")


def config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let `--config FILE` stand after the command as well as before it."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        help="TOML file with the settings. Environment variables override it.",
    )(command)


def settings_of(context: click.Context, config: Path | None, *, needs_keys: bool = False) -> Settings:
    """Read the settings. Raises ConfigurationError."""
    return load(config or context.find_root().obj, needs_keys=needs_keys)


def quietly() -> None:
    """Send log lines to standard error, and only our own: standard output is for data, and our errors say it all."""
    configure_logging("console", "warning", sys.stderr.buffer)
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on uvloop where there is one."""
    try:
        import uvloop  # noqa: PLC0415 - not on every platform
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)
