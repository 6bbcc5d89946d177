"""Which upstream serves a job."""

from __future__ import annotations

import pytest

from streamworker.worker.routing import choose_upstreams

SERVED = {"open": ["gpt-*", "o[13]-mini"], "local": ["gpt-oss-?b", "*:latest"], "default": []}


@pytest.mark.parametrize(
    ("named", "model", "chosen"),
    [
        (None, "gpt-5", "open"),
        (None, "gpt-oss-20b", "open"),  # the first that serves it, in the configuration's order
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
def test_upstream_is_the_named_else_first_that_serves_else_default(
    named: str | None, model: str, chosen: str | None
) -> None:
    """A named upstream is taken at its word; otherwise patterns decide, with regard to case."""
    assert choose_upstreams(named, model, SERVED) == ((chosen,) if chosen else ())


def test_upstream_without_default_is_none() -> None:
    """Nothing serves the model and there is no `default`: that is said, not guessed."""
    assert choose_upstreams(None, "x", {"open": ["gpt-*"]}) == ()
    assert choose_upstreams(None, "x", {}) == ()


@pytest.mark.parametrize(
    ("named", "model", "chosen"),
    [
        (None, "gpt-5", ("open", "backup", "default")),
        (None, "o3-mini", ("open", "default")),  # who does not serve the model is left out
        ("open", "gpt-5", ("open",)),  # who names an upstream means it
        (None, "qwen:latest", ("local",)),
        (None, "o2-mini", ("default",)),
    ],
)
def test_upstreams_to_fall_back_on_follow_in_their_order(
    named: str | None, model: str, chosen: tuple[str, ...]
) -> None:
    """Those that serve the model, behind the one that is chosen by it."""
    served = SERVED | {"backup": ["gpt-5"], "default": ["*"]}
    served = {name: served[name] for name in ("open", "local", "backup", "default")}

    assert choose_upstreams(named, model, served, {"open": ["backup", "default"]}) == chosen
