"""What several commands share: options, settings, logging, and waiting for Kafka with a message and a time limit."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from streamworker.config import Settings, load
from streamworker.errors import KafkaUnavailable
from streamworker.telemetry.logging import configure_logging
from streamworker.wire.job import JOB_ID_PATTERN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine, Iterator

__all__ = [
    "HINT_S",
    "check_job_id",
    "config_file",
    "config_option",
    "hint",
    "parse_since",
    "quietly",
    "run_async",
    "settings_of",
    "timeout_option",
    "waiting",
    "within",
]

HINT_S = 3.0
"""Seconds after which a command says what it waits for."""

T = TypeVar("T")

_DURATION = re.compile(r"(\d{1,6})([smhd])")
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


def config_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option `--config FILE`, so that it may follow the command as well as precede it."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path, dir_okay=False),
        help="TOML file with the settings. Environment variables override it.",
    )(command)


def timeout_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the option `--timeout SECONDS`."""
    return click.option(
        "--timeout",
        "timeout_s",
        type=click.FloatRange(0.1, 3600),
        default=10.0,
        show_default=True,
        metavar="SECONDS",
        help="Give up if Kafka does not answer for this long.",
    )(command)


def parse_since(context: click.Context, parameter: click.Parameter, value: str | None) -> float:
    """Convert a time, or the duration from then to now, to ms since the epoch. Raises BadParameter."""
    if value is None:
        return 0.0
    if found := _DURATION.fullmatch(value):
        age = timedelta(**{_UNITS[found[2]]: int(found[1])})
        return (time.time() - age.total_seconds()) * 1000
    try:
        moment = datetime.fromisoformat(value.upper())
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        message = f"{value!r} is not a valid time: use 90m, 2h, 3d or 2030-01-31T12:00:00Z"
        raise click.BadParameter(message, context, parameter)
    return moment.timestamp() * 1000


def check_job_id(job_id: str) -> None:
    """Refuse an id that no job can have: a command would wait for it for ever. Raises UsageError."""
    if not re.fullmatch(JOB_ID_PATTERN, job_id):
        raise click.UsageError(f"{job_id!r} is not a valid job id: 1 to 200 of A-Z a-z 0-9 . _ : -")


def config_file(context: click.Context, config: Path | None) -> Path | None:
    """Return the path of the TOML file: the command's own option, or the one before the command."""
    path: Path | None = config or context.find_root().obj
    return path


def settings_of(context: click.Context, config: Path | None, *, needs_keys: bool = False) -> Settings:
    """Read the settings. Raises ConfigurationError."""
    return load(config_file(context, config), needs_keys=needs_keys)


def quietly() -> None:
    """Log warnings of this package to standard error. Standard output is for data; aiokafka's log is only recorded."""
    configure_logging("console", "warning", sys.stderr.buffer)
    library = logging.getLogger("aiokafka")
    library.propagate = False
    library.handlers[:] = [_LAST_ERROR]


class _LastError(logging.Handler):
    """Keep the last warning of aiokafka: it is the reason why a client waits."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.text = record.getMessage()


_LAST_ERROR = _LastError()


@contextmanager
def hint(text: str) -> Iterator[asyncio.Event]:
    """Print `text` to standard error if the block is not left within `HINT_S` seconds; set the event that it yields."""
    printed = asyncio.Event()

    def show() -> None:
        click.echo(f"{text} ...{_reason()}", err=True)
        printed.set()

    timer = asyncio.get_running_loop().call_later(HINT_S, show)
    try:
        yield printed
    finally:
        timer.cancel()


@asynccontextmanager
async def waiting(action: str, timeout_s: float) -> AsyncIterator[None]:
    """Print `action` after `HINT_S` seconds, and give up after `timeout_s` seconds.

    Raises:
        KafkaUnavailable: the block took longer than `timeout_s` seconds.
    """
    limit = asyncio.timeout(timeout_s)
    try:
        with hint(f"{action}, for at most {timeout_s:g} s"):
            async with limit:
                yield
    except TimeoutError:
        if not limit.expired():
            raise
        message = f"{action}: no answer within {timeout_s:g} s{_reason()}"
        raise KafkaUnavailable(f"{message}; is kafka.bootstrap_servers right?") from None


async def within(items: AsyncIterator[T], action: str, timeout_s: float) -> AsyncIterator[T]:
    """Yield the items; each one is waited for as in `waiting`. Raises KafkaUnavailable."""
    while True:
        async with waiting(action, timeout_s):
            try:
                item = await anext(items)
            except StopAsyncIteration:
                return
        yield item


def _reason() -> str:
    return f"; last error: {_LAST_ERROR.text}" if _LAST_ERROR.text else ""


def run_async(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine, on uvloop if it is installed."""
    try:
        import uvloop  # noqa: PLC0415 - not available on every platform
    except ImportError:
        return asyncio.run(work)
    return uvloop.run(work)
