"""API keys: the file, the rules for tenants, and what is refused."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from streamworker.errors import ConfigurationError
from streamworker.gateway.keys import SCOPES, digest_of, new_key, read_keys, rendered, tenant_fault
from streamworker.gateway.watched import CHECK_S, Watched

if TYPE_CHECKING:
    from pathlib import Path

TOPICS = ("streamworker.jobs", "bulk")
SHA = digest_of("swk_key")


def write(directory: Path, text: str) -> Path:
    path = directory / "keys.toml"
    path.write_text(text)
    return path


def faults(directory: Path, text: str) -> list[str]:
    path = write(directory, text)
    with pytest.raises(ConfigurationError) as caught:
        read_keys(path, TOPICS)
    return [fault.removeprefix(f"gateway.keys_file: {path}: ") for fault in caught.value.faults]


def test_key_that_was_made_is_found_by_its_digest(tmp_path: Path) -> None:
    """The file holds no key."""
    key = new_key()
    path = write(tmp_path, rendered("backend", key, "acme"))

    name, found = read_keys(path, TOPICS)[digest_of(key)]

    assert key.startswith("swk_")
    assert key not in path.read_text()
    assert (name, found.tenant, found.scopes) == ("backend", "acme", SCOPES)
    assert (found.max_streams, found.requests_per_minute) == (1000, 6000)


def test_keys_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    """Some editors begin a file with it."""
    key = new_key()
    path = tmp_path / "keys.toml"
    path.write_bytes(b"\xef\xbb\xbf" + rendered("backend", key, "acme").replace("\n", "\r\n").encode())

    assert digest_of(key) in read_keys(path, TOPICS)


def test_keys_are_all_different() -> None:
    """256 random bits, which are 43 characters in base64."""
    keys = {new_key() for _ in range(100)}

    assert (len(keys), {len(key.removeprefix("swk_")) for key in keys}) == (100, {43})


@pytest.mark.parametrize("tenant", ["acme", "a", "a-b_c9", "x" * 64, ""])
def test_tenant_that_can_be_used_has_no_fault(tenant: str) -> None:
    """The empty one is for every job."""
    assert tenant_fault(tenant, TOPICS) is None


@pytest.mark.parametrize(
    "tenant", ["a.b", "Acme", "x" * 65, "a b", "é", "a:b", "b", "streamworker", "bulk", "a\n"]
)
def test_tenant_that_collides_with_other_ids_has_a_fault(tenant: str) -> None:
    """Ids of batches begin with `b.`, and those of jobs without an id with the name of their topic."""
    assert tenant_fault(tenant, TOPICS)


KEY = f'[keys.a]\nsha256 = "{SHA}"\ntenant = "acme"\nscopes = ["read"]\n'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nonsense", "is not valid TOML: Expected '=' after a key in a key/value pair (at end of document)"),
        ("key = 1", "key: is not known; keys are tables [keys.NAME]"),
        ("keys = 1", "keys: must be a table"),
        ("[keys]\na = 1", "keys.a: must be a table"),
        (
            KEY + "max = 1",
            "keys.a.max: is not known; a key has sha256, tenant, scopes, max_streams and requests_per_minute",
        ),
        (KEY.replace("tenant", "#"), "keys.a.tenant: is required"),
        (KEY.replace("scopes", "#"), "keys.a.scopes: is required"),
        (KEY.replace("sha256", "#"), "keys.a.sha256: is required"),
        (
            KEY.replace('["read"]', "[]"),
            "keys.a.scopes: must name at least one of submit, read, cancel, token",
        ),
        (KEY.replace("read", "write"), "keys.a.scopes.0: must be 'submit', 'read', 'cancel' or 'token'"),
        (
            KEY.replace(SHA, "swk_secret"),
            "keys.a.sha256: must be the SHA-256 of a key as 64 hexadecimal digits; `streamworker gateway key` prints it",
        ),
        (
            KEY.replace("acme", "A"),
            "keys.a.tenant: must be 1 to 64 lower-case letters, digits, hyphens and underscores, or empty for every job",
        ),
        (KEY.replace("acme", "b"), "keys.a.tenant: cannot be b: the ids of batch jobs begin with it"),
        (
            KEY.replace("acme", "bulk"),
            "keys.a.tenant: cannot be bulk: the ids of jobs without a job_id begin with the name of topic bulk",
        ),
        (
            KEY.replace("keys.a", 'keys."a b"'),
            "keys.a b: must be the name of a key: 1 to 64 letters, digits, hyphens and underscores",
        ),
        (KEY + KEY.replace("keys.a", "keys.c"), "two keys have the same sha256"),
        (KEY + "max_streams = 0", "keys.a.max_streams: must be greater than or equal to 1"),
    ],
)
def test_keys_file_with_a_fault_is_refused_with_its_place(tmp_path: Path, text: str, expected: str) -> None:
    """No fault repeats a value: a user might put the key itself there."""
    found = faults(tmp_path, text)

    assert found == [expected]
    assert "swk_secret" not in expected


def test_keys_file_that_does_not_exist_says_how_to_make_it(tmp_path: Path) -> None:
    """The first thing that a new user meets."""
    path = tmp_path / "none.toml"
    with pytest.raises(ConfigurationError) as caught:
        read_keys(path, TOPICS)

    [fault] = caught.value.faults
    assert fault == (
        f"gateway.keys_file: {path}: No such file or directory; make it with `streamworker gateway key NAME --tenant T`"
    )


@pytest.mark.parametrize("name", ["", "a b", "a.b", "x" * 65])
def test_key_name_that_would_not_be_one_name_in_toml_is_refused(name: str) -> None:
    """It would make another table."""
    with pytest.raises(ValueError, match="must be the name of a key"):
        rendered(name, "swk_k", "acme")


# Changes of the file


def test_file_that_changes_is_read_again_and_a_bad_change_is_not_taken(tmp_path: Path) -> None:
    """At most once per interval; the last valid content stays."""
    path, now = write(tmp_path, KEY), [0.0]
    watched = Watched(path, lambda: read_keys(path, TOPICS), clock=lambda: now[0])

    def changed(text: str) -> list[str]:
        path.write_text(text)
        os.utime(path, ns=(int(now[0] * 1e9) + 5, int(now[0] * 1e9) + 5))
        return [name for name, _ in watched.get().values()]

    assert changed(KEY.replace("keys.a", "keys.c")) == ["a"]
    now[0] += CHECK_S
    assert changed(KEY.replace("keys.a", "keys.c")) == ["c"]
    now[0] += CHECK_S
    assert changed("nonsense") == ["c"]
    now[0] += CHECK_S
    assert changed("") == []
    path.unlink()
    now[0] += CHECK_S
    assert [*watched.get()] == []


def test_content_without_a_file_never_changes() -> None:
    """Nothing is configured."""
    assert Watched(None, lambda: 7).get() == 7
