"""A test that cannot run here says why; where everything has to run, that is a failure."""

import os
from typing import NoReturn

import pytest


def need(reason: str) -> NoReturn:
    """Skip, or fail with STREAMWORKER_TEST_REQUIRE=all."""
    if os.environ.get("STREAMWORKER_TEST_REQUIRE") == "all":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
