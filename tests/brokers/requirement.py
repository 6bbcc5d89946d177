"""Skip tests whose requirements are missing, or fail them if every test is required."""

import os
from typing import NoReturn

import pytest


def need(reason: str) -> NoReturn:
    """Skip the test with a reason; fail it with STREAMWORKER_TEST_REQUIRE=all."""
    if os.environ.get("STREAMWORKER_TEST_REQUIRE") == "all":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
