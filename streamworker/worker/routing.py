"""Which upstreams may serve a job (contract §2): the one it names, else the first that serves its model, else `default`.

Behind the one that is chosen by model come those it falls back on. Who names an upstream means that one.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["DEFAULT_UPSTREAM", "choose_upstreams"]

DEFAULT_UPSTREAM = "default"


def choose_upstreams(
    named: str | None,
    model: str,
    served: Mapping[str, Sequence[str]],
    fallback: Mapping[str, Sequence[str]] | None = None,
) -> tuple[str, ...]:
    """Return the upstreams' names, in the order in which they are tried; none if there is none.

    `served` maps names, in the order of the configuration, to patterns of model names (`*`, `?`, `[…]`). A job that
    names an upstream gets that one, whatever models it says it serves. `fallback` maps names to those that stand in
    for them; one that does not serve the model is left out.
    """
    if named is not None:
        return (named,) if named in served else ()
    first = next((name for name in served if _serves(served[name], model)), None)
    if first is None:
        return (DEFAULT_UPSTREAM,) if DEFAULT_UPSTREAM in served else ()
    stand_ins = (fallback or {}).get(first, ())
    return (first, *(name for name in stand_ins if _serves(served[name], model)))


def _serves(patterns: Sequence[str], model: str) -> bool:
    return any(fnmatchcase(model, pattern) for pattern in patterns)
