"""Start the broker, the practice upstream and the worker of the demo, and stop them at its end."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager, contextmanager
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, NamedTuple
from uuid import uuid4

from streamworker.app import App
from streamworker.config import PREFIX, Settings, load
from streamworker.demo.broker import EmbeddedBroker
from streamworker.kafka.topics import open_admin
from streamworker.practice import PracticeUpstream
from streamworker.telemetry.logging import configure_logging

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

__all__ = ["Stage", "set_up"]

_BROKER = f"{PREFIX}KAFKA__BOOTSTRAP_SERVERS"
_UPSTREAM = f"{PREFIX}UPSTREAMS__DEFAULT__BASE_URL"
PARTITIONS = 4


class Stage(NamedTuple):
    """The parts of the demo; the worker is not running yet. `practice` is None if the environment names an upstream."""

    run: str
    settings: Settings
    app: App
    practice: PracticeUpstream | None


@asynccontextmanager
async def set_up(say: Callable[[str], None], environ: Mapping[str, str] = os.environ) -> AsyncIterator[Stage]:
    """Start broker and practice upstream, unless the environment names others, and create topics for the demo."""
    run = f"demo-{uuid4().hex[:6]}"
    with _quiet_log(), _broker(environ, say) as bootstrap:
        async with _upstream(environ, say) as (base_url, practice):
            settings = _settings(run, bootstrap, base_url, environ)
            async with open_admin(settings) as admin:
                await admin.create(partitions=PARTITIONS)
                try:
                    yield Stage(run, settings, App(settings), practice)
                finally:
                    await admin.delete()


def _settings(run: str, bootstrap: str, base_url: str, environ: Mapping[str, str]) -> Settings:
    own = {
        "KAFKA__BOOTSTRAP_SERVERS": bootstrap,
        "UPSTREAMS__DEFAULT__BASE_URL": base_url,
        "WORKER__GROUP_ID": f"streamworker.{run}",
        "WORKER__SESSION_TIMEOUT_S": "10",
        "TELEMETRY__HTTP_HOST": "127.0.0.1",
        "TELEMETRY__HTTP_PORT": "0",
        **{
            f"TOPICS__{name}": f"streamworker.{run}.{name.lower()}"
            for name in ("JOBS", "EVENTS", "CONTROL", "DLQ")
        },
    }
    return load(None, {**environ, **{PREFIX + name: value for name, value in own.items()}})


@contextmanager
def _quiet_log() -> Iterator[None]:
    """Log errors only, so that the worker's log lines do not disturb the display."""
    with TemporaryFile() as log:
        configure_logging("json", "info", log)
        yield
        configure_logging("json", "error")


@contextmanager
def _broker(environ: Mapping[str, str], say: Callable[[str], None]) -> Iterator[str]:
    if given := environ.get(_BROKER):
        say(f"broker     {given} (from {_BROKER})")
        yield given
        return
    with EmbeddedBroker() as broker:
        say(f"broker     {broker.bootstrap} (embedded)")
        yield broker.bootstrap


@asynccontextmanager
async def _upstream(
    environ: Mapping[str, str], say: Callable[[str], None]
) -> AsyncIterator[tuple[str, PracticeUpstream | None]]:
    if given := environ.get(_UPSTREAM):
        say(f"upstream   {given} (from {_UPSTREAM})")
        yield given, None
        return
    async with PracticeUpstream() as practice:
        say(f"upstream   {practice.base_url} (practice)")
        yield practice.base_url, practice
