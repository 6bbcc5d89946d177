import io
import logging
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
import structlog

from streamworker.telemetry.logging import FLOORS


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Logging is the process's; leave it as it was found."""
    loggers = [logging.getLogger(), *map(logging.getLogger, FLOORS)]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    for handler in loggers[0].handlers[:]:
        if type(handler).__module__.startswith("streamworker."):
            loggers[0].removeHandler(handler)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


class Stream(io.BytesIO):
    """A log's destination that hands out what was written, as objects."""

    def lines(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.getvalue().splitlines()]

    def only(self) -> dict[str, Any]:
        (line,) = self.lines()
        return line


@pytest.fixture
def stream() -> Stream:
    return Stream()
