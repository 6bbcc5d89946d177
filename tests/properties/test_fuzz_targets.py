"""The fuzz targets pass on their seeds. Inputs that once failed are seeds."""

from __future__ import annotations

import pytest

from fuzz.seeds import seeds_of
from fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_fuzz_target_holds_on_every_seed(name: str) -> None:
    """And on each seed cut short at every byte."""
    seeds = seeds_of(name)

    assert seeds
    for seed in seeds:
        TARGETS[name](seed)
        for end in range(0, min(len(seed), 400), 7):
            TARGETS[name](seed[:end])
