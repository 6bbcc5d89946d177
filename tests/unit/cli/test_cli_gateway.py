"""`streamworker gateway key`, and what `streamworker gateway` refuses at its start."""

from __future__ import annotations

import stat
import tomllib
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner, Result

from streamworker.cli.gateway import gateway
from streamworker.errors import ConfigurationError
from streamworker.gateway.keys import digest_of, read_keys

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(gateway, list(arguments))


def test_key_is_printed_once_and_its_digest_is_added_to_the_file(tmp_path: Path) -> None:
    """The file can be read by its owner only; a second key is added behind the first."""
    made = [
        invoke("key", name, "--tenant", "acme", *scopes)
        for name, *scopes in [("one",), ("two", "--scope", "read")]
    ]
    file = tmp_path / "gateway-keys.toml"
    keys = read_keys(file, ("streamworker.jobs",))

    assert [result.exit_code for result in made] == [0, 0]
    for result, (name, scopes) in zip(
        made, [("one", ("submit", "read", "cancel", "token")), ("two", ("read",))], strict=True
    ):
        key = result.stdout.strip()
        assert key.startswith("swk_")
        assert keys[digest_of(key)][0] == name
        assert keys[digest_of(key)][1].scopes == scopes
        assert key not in file.read_text()
        assert name in result.stderr
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_key_can_be_printed_instead_of_added(tmp_path: Path) -> None:
    """For a secret of Kubernetes: the entry on standard output, the key on standard error."""
    result = invoke("key", "one", "--tenant", "", "--print")

    [(name, entry)] = tomllib.loads(result.stdout)["keys"].items()
    assert (name, entry["tenant"]) == ("one", "")
    assert entry["sha256"] == digest_of(result.stderr.strip())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("one",), "Missing option '--tenant'"),
        (("one", "--tenant", "A"), "must be 1 to 64 lower-case letters"),
        (("one", "--tenant", "b"), "cannot be b"),
        (("one", "--tenant", "streamworker"), "cannot be streamworker"),
        (("a b", "--tenant", "acme"), "must be the name of a key"),
        (("one", "--tenant", "acme", "--scope", "write"), "is not one of"),
    ],
)
def test_key_that_could_not_be_used_is_refused(tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    """Nothing is written."""
    result = invoke("key", *arguments)

    assert result.exit_code == 2
    assert text in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_key_with_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    """The file would have two tables of one name."""
    invoke("key", "one", "--tenant", "acme")
    before = (tmp_path / "gateway-keys.toml").read_text()
    result = invoke("key", "one", "--tenant", "other")

    assert result.exit_code == 2
    assert "has a key one already" in result.stderr
    assert (tmp_path / "gateway-keys.toml").read_text() == before


def test_gateway_without_keys_says_how_to_make_one() -> None:
    """Before it connects to anything."""
    result = CliRunner(catch_exceptions=True).invoke(
        gateway, [], env={"STREAMWORKER_TELEMETRY__HTTP_PORT": "0"}
    )

    assert isinstance(result.exception, ConfigurationError)
    assert "make it with `streamworker gateway key NAME --tenant T`" in str(result.exception)
