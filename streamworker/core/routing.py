"""Which upstream serves a job (contract §2): the one it names, else the first that serves its model, else `default`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["DEFAULT_UPSTREAM", "choose_upstream"]

DEFAULT_UPSTREAM = "default"


def choose_upstream(named: str | None, model: str, served: Mapping[str, Sequence[str]]) -> str | None:
    """Return the upstream's name, or None if there is none.

    `served` maps names, in the order of the configuration, to patterns of model names (`*`, `?`, `[…]`). A job that
    names an upstream gets that one, whatever models it says it serves.
    """
    if named is not None:
        return named if named in served else None
    for name, patterns in served.items():
        if any(fnmatchcase(model, pattern) for pattern in patterns):
            return name
    return DEFAULT_UPSTREAM if DEFAULT_UPSTREAM in served else None
