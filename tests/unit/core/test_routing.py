"""Which upstream serves a job."""

from __future__ import annotations

import pytest

from streamworker.core.routing import choose_upstream

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
    assert choose_upstream(named, model, SERVED) == chosen


def test_upstream_without_default_is_none() -> None:
    """Nothing serves the model and there is no `default`: that is said, not guessed."""
    assert choose_upstream(None, "x", {"open": ["gpt-*"]}) is None
    assert choose_upstream(None, "x", {}) is None
