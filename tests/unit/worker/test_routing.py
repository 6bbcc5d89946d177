"""Which upstreams serve a job, and in which order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streamworker.worker.routing import choose_upstreams
from tests.unit.worker.bench import make_policy

if TYPE_CHECKING:
    from streamworker.worker.policy import UpstreamPolicy

MODELS = {"open": ("gpt-*", "o[13]-mini"), "local": ("gpt-oss-?b", "*:latest"), "default": ()}


def policies(models: dict[str, tuple[str, ...]], **fallback: tuple[str, ...]) -> dict[str, UpstreamPolicy]:
    """Return upstreams in this order, each with the patterns of its models and its fallbacks."""
    return {
        name: make_policy(name=name, models=patterns, fallback=fallback.get(name, ()))
        for name, patterns in models.items()
    }


@pytest.mark.parametrize(
    ("named", "model", "chosen"),
    [
        (None, "gpt-5", "open"),
        (None, "gpt-oss-20b", "open"),  # two match: the order of the configuration decides
        (None, "o3-mini", "open"),
        (None, "qwen:latest", "local"),
        (None, "o2-mini", "default"),
        (None, "GPT-5", "default"),
        ("local", "gpt-5", "local"),
        ("default", "gpt-5", "default"),
        ("elsewhere", "gpt-5", None),
        ("", "gpt-5", None),
    ],
)
def test_upstream_is_the_named_one_else_the_first_that_matches_else_default(
    named: str | None, model: str, chosen: str | None
) -> None:
    """A named upstream is used whatever its patterns; otherwise the patterns decide, and case matters."""
    assert choose_upstreams(named, model, policies(MODELS)) == ((chosen,) if chosen else ())


def test_upstream_for_an_unknown_model_without_default_is_none() -> None:
    """No upstream is guessed for a model that no pattern matches."""
    assert choose_upstreams(None, "x", policies({"open": ("gpt-*",)})) == ()
    assert choose_upstreams(None, "x", {}) == ()


@pytest.mark.parametrize(
    ("named", "model", "chosen"),
    [
        (None, "gpt-5", ("open", "backup", "default")),
        (None, "o3-mini", ("open", "default")),  # a fallback that does not serve the model is left out
        ("open", "gpt-5", ("open",)),  # a named upstream has no fallback
        (None, "qwen:latest", ("local",)),
        (None, "o2-mini", ("default",)),
    ],
)
def test_upstreams_of_a_model_are_followed_by_the_fallbacks_that_serve_it(
    named: str | None, model: str, chosen: tuple[str, ...]
) -> None:
    """Fallbacks keep the order of the configuration."""
    models: dict[str, tuple[str, ...]] = {
        "open": MODELS["open"],
        "local": MODELS["local"],
        "backup": ("gpt-5",),
        "default": ("*",),
    }

    assert choose_upstreams(named, model, policies(models, open=("backup", "default"))) == chosen
