"""Suggest the setting that a misspelt name was meant to be, for TOML keys and environment variables."""

from __future__ import annotations

import re
from difflib import get_close_matches

from streamworker.config.settings import PREFIX, Settings, UpstreamSettings, describe

__all__ = ["is_of_kubernetes", "nearest_path", "nearest_variable"]

_CUTOFF = 0.8
_UPSTREAMS = "upstreams."
_TEMPLATE = f"{_UPSTREAMS}<name>."

_OF_KUBERNETES = re.compile(
    rf"{PREFIX}(?:.+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_.+)?|PORT(?:_\d+_(?:TCP|UDP|SCTP)(?:_.+)?)?)"
)


def is_of_kubernetes(variable: str) -> bool:
    """Return whether Kubernetes sets this variable in every pod, for a Service whose name begins with streamworker."""
    return _OF_KUBERNETES.fullmatch(variable) is not None


def nearest_path(path: str) -> str | None:
    """Return the setting that is most similar to an unknown path of the TOML file, or None."""
    section, _, name = path.rpartition(".")
    if not section and (close := get_close_matches(path, Settings.model_fields, 1, _CUTOFF)):
        return close[0]
    known = _paths(path.split(".")[1] if path.startswith(_UPSTREAMS) and path.count(".") > 1 else "<name>")
    close = get_close_matches(
        path, [other for other in known if other.rpartition(".")[0] == section], 1, _CUTOFF
    )
    elsewhere = [other for other in known if other.rpartition(".")[2] == name and "<" not in other]
    return next(iter([*close, *elsewhere, *get_close_matches(path, known, 1, _CUTOFF)]), None)


def nearest_variable(variable: str) -> str | None:
    """Return the variable that an unknown one was meant to be, also with a wrong number of underscores, or None."""
    squashed = _squash(variable)
    known = {_squash(name): name for name in map(_variable, _paths("<name>")) if "<" not in name}
    if squashed in known:
        return known[squashed]
    for field in sorted(UpstreamSettings.model_fields, key=len, reverse=True):
        if found := re.fullmatch(rf"{PREFIX}UPSTREAMS_(.+)_{field.upper()}", squashed):
            return _variable(f"upstreams.{found[1]}.{field}")
    if variable.startswith(f"{PREFIX}UPSTREAMS__"):
        path = nearest_path(".".join(variable.removeprefix(PREFIX).lower().split("__")))
        return None if path is None else _variable(path)
    return next((known[name] for name in get_close_matches(squashed, known, 1, 0.85)), None)


def _paths(upstream: str) -> list[str]:
    return [path.replace(_TEMPLATE, f"{_UPSTREAMS}{upstream}.") for path, _, _ in describe()]


def _variable(path: str) -> str:
    return PREFIX + path.upper().replace(".", "__")


def _squash(variable: str) -> str:
    return re.sub("_+", "_", variable)
