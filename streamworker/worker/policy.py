"""The settings of one upstream, as the worker uses them."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.ports import Upstream

__all__ = ["UpstreamPolicy"]


@dataclass(frozen=True, kw_only=True, slots=True)
class UpstreamPolicy:
    """One configured upstream: how to call it, which jobs it serves, and what it allows. Times in seconds.

    Limits count this process's calls; None means unlimited. `scrub` removes secrets from the upstream's texts.
    """

    name: str
    upstream: Upstream
    scrub: Callable[[str], str]
    models: tuple[str, ...] = ("*",)
    fallback: tuple[str, ...] = ()
    first_delta_timeout_s: float
    idle_timeout_s: float
    include_usage: bool = True
    continuous_usage: bool = False
    cancel_grace_s: float = 0
    max_tries: int = 1
    max_restarts: int = 0
    max_streams: int
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    keeps_reserved_tokens: bool = False
    """Whether the provider counts a call's `max_tokens`, whatever the call used."""
    circuit_failure_threshold: int
    circuit_open_s: float
    max_wait_s: float = inf
    key_version: Callable[[], object] = lambda: None
    """Returns a value that changes when the API key is replaced; never raises."""
