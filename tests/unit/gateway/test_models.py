"""`/v1/models`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streamworker.config import load
from streamworker.gateway.models import is_served, model_names, unknown_model
from tests.unit.gateway.served import READ_ONLY, Served, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from streamworker.config import Settings


def settings(models: str, *, more: str = "", **others: str) -> Settings:
    """Return settings of upstreams with these models."""
    environ = {"STREAMWORKER_GATEWAY__MODELS": more}
    for name, listed in {"default": models, **others}.items():
        environ[f"STREAMWORKER_UPSTREAMS__{name.upper()}__MODELS"] = listed
        environ[f"STREAMWORKER_UPSTREAMS__{name.upper()}__BASE_URL"] = "http://localhost:1/v1"
    return load(None, environ, needs_keys=False)


@pytest.mark.parametrize(
    ("models", "more", "expected"),
    [
        ("*", "", []),
        ("gpt-4,apertus-*,o?,[ab]", "", ["gpt-4"]),
        ("b,a", "c", ["b", "a", "c"]),
        ("a", "a,b", ["a", "b"]),
        ("*", "org/name", ["org/name"]),
    ],
)
def test_names_are_listed_once_and_patterns_never(models: str, more: str, expected: list[str]) -> None:
    """In the order of the configuration."""
    assert model_names(settings(models, more=more)) == expected


def test_names_of_all_upstreams_are_listed() -> None:
    """Not only those of the default one."""
    assert sorted(model_names(settings("a", eu="b", us="c,a"))) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("gpt-4", True),
        ("apertus-70b", True),
        ("apertus", False),
        ("GPT-4", False),
        ("extra", True),
        ("x", False),
    ],
)
def test_model_is_served_by_name_pattern_or_setting(model: str, expected: bool) -> None:
    """Names are compared as they are written."""
    assert is_served(settings("gpt-4,apertus-*", more="extra"), model) is expected


def test_error_does_not_repeat_a_name_of_any_length() -> None:
    """It is text of the client."""
    error = unknown_model("x" * 10_000)

    assert (error.status, error.code, error.param) == (404, "model_not_found", "model")
    assert len(error.message) < 250


@pytest.fixture
async def listing(tmp_path: Path) -> AsyncIterator[Served]:
    """A gateway with two models."""
    async with served(tmp_path, models="apertus-70b,org/name") as running:
        yield running


async def test_models_are_openais_list(listing: Served) -> None:
    """Read rights are enough."""
    status, value, headers = await listing.call("GET", "/v1/models", key=READ_ONLY)

    assert status == 200
    assert headers["Cache-Control"] == "no-store"
    assert value == {
        "object": "list",
        "data": [
            {"id": name, "object": "model", "created": 0, "owned_by": "streamworker"}
            for name in ("apertus-70b", "org/name")
        ],
    }


@pytest.mark.parametrize("path", ["apertus-70b", "org/name", "org%2Fname"])
async def test_model_is_found_by_its_name(listing: Served, path: str) -> None:
    """SDKs escape the slash."""
    status, value, _ = await listing.call("GET", f"/v1/models/{path}")

    assert status == 200
    assert value["id"] == path.replace("%2F", "/")


async def test_model_that_is_not_listed_is_404(listing: Served) -> None:
    """Whether a pattern matches it or not: the list is what there is."""
    status, value, _ = await listing.call("GET", "/v1/models/gpt-4")

    assert (status, value["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/apertus-70b"])
async def test_models_need_a_credential(listing: Served, path: str) -> None:
    """There is no anonymous access."""
    status, value, _ = await listing.call("GET", path, key=None)

    assert (status, value["error"]["code"]) == (401, "unauthenticated")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/apertus-70b"])
async def test_models_cannot_be_changed(listing: Served, path: str) -> None:
    """DELETE exists in OpenAI's API, for fine-tuned models."""
    status, value, _ = await listing.call("DELETE", path)

    assert (status, value["error"]["code"]) == (405, "method_not_allowed")
