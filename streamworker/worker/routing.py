"""Which upstreams may serve a job: the named one, else the first that serves the model, else `default`.

An upstream that was chosen by model is followed by its fallbacks. A job that names an upstream gets no fallback.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streamworker.worker.policy import UpstreamPolicy

__all__ = ["DEFAULT_UPSTREAM", "choose_upstreams"]

DEFAULT_UPSTREAM = "default"


def choose_upstreams(
    named: str | None, model: str, policies: Mapping[str, UpstreamPolicy]
) -> tuple[str, ...]:
    """Return the names of the upstreams that may serve a job, in the order in which they are tried.

    The result is empty if no upstream may. `policies` is in the order of the configuration; the models of a policy are
    patterns (`*`, `?`, `[…]`). A job that names an upstream gets it whatever models the upstream serves. A fallback
    that does not serve the model is left out.
    """
    if named is not None:
        return (named,) if named in policies else ()
    first = next((policy for policy in policies.values() if _serves(policy.models, model)), None)
    if first is None:
        return (DEFAULT_UPSTREAM,) if DEFAULT_UPSTREAM in policies else ()
    return (first.name, *(name for name in first.fallback if _serves(policies[name].models, model)))


def _serves(patterns: Sequence[str], model: str) -> bool:
    return any(fnmatchcase(model, pattern) for pattern in patterns)
