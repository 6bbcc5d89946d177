"""Hypothesis profiles: random examples on a developer's machine, the same examples in CI."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("streamworker", deadline=None, max_examples=200)
settings.register_profile(
    "streamworker-ci", settings.get_profile("streamworker"), derandomize=True, database=None
)
settings.load_profile("streamworker-ci" if os.environ.get("CI") == "true" else "streamworker")
