import io
from typing import Any

import orjson
import pytest


class Stream(io.BytesIO):
    """A log stream whose lines can be read as objects."""

    def lines(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.getvalue().splitlines()]

    def only(self) -> dict[str, Any]:
        (line,) = self.lines()
        return line


@pytest.fixture
def stream() -> Stream:
    return Stream()
