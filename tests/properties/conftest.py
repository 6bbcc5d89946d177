"""Hypothesis profiles: random examples on a developer's machine, the same examples in CI.

`STREAMWORKER_TEST_EXAMPLES` is the number of examples of each property; `make test-long` sets more than `make test`.
"""

from __future__ import annotations

import os

from hypothesis import settings

examples = int(os.environ.get("STREAMWORKER_TEST_EXAMPLES", "100"))
settings.register_profile("streamworker", deadline=None, max_examples=examples)
settings.register_profile(
    "streamworker-ci", settings.get_profile("streamworker"), derandomize=True, database=None
)
settings.load_profile("streamworker-ci" if os.environ.get("CI") == "true" else "streamworker")
