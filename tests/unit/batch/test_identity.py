"""Digests, job ids, and the ids of output lines."""

from __future__ import annotations

import hashlib
import json

import pytest

from streamworker.batch.identity import JobIds, JobRef, digest_of, digest_of_output, faulty_digest, output_id

DIGEST = bytes(range(16))


def test_digest_is_sha256_over_custom_id_nul_and_canonical_json() -> None:
    """Another program can compute it: sorted keys at every level, no spaces, UTF-8."""
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "é\u2028"}],
        "a": {"z": 1, "b": [2.5, None, True]},
    }
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    assert digest_of("id", body) == hashlib.sha256(b"id\0" + text.encode()).digest()[:16]


@pytest.mark.parametrize(("one", "other"), [("a", "b"), ("", "\0"), ("ab", "a")])
def test_digest_differs_by_custom_id(one: str, other: str) -> None:
    """Two lines with one body have different jobs."""
    assert digest_of(one, {"m": 1}) != digest_of(other, {"m": 1})


def test_digest_of_a_body_with_surrogates_is_that_of_its_replacement() -> None:
    """A lone surrogate has no UTF-8, so it counts as U+FFFD."""
    assert digest_of("a", {"x": "\ud800"}) == digest_of("a", {"x": "\ufffd"})


def test_job_ids_are_read_back() -> None:
    """With and without a round."""
    ids = JobIds("b.night.")

    assert ids.job_id(DIGEST, 0) == "b.night.000102030405060708090a0b0c0d0e0f"
    for round_ in (0, 1, 12, 250):
        assert ids.read(ids.job_id(DIGEST, round_).encode()) == JobRef(DIGEST, round_)


@pytest.mark.parametrize(
    "key",
    [
        None,
        b"",
        b"b.night.",
        b"b.night.0001",
        b"b.night.000102030405060708090a0b0c0d0e0f.0",
        b"b.night.000102030405060708090a0b0c0d0e0f.251",
        b"b.night.000102030405060708090a0b0c0d0e0f.1000",
        b"b.night.000102030405060708090a0b0c0d0e0f.1x",
        b"b.night.000102030405060708090A0B0C0D0E0F",
        b"b.night.2.000102030405060708090a0b0c0d0e0f",
        b"b.nights.000102030405060708090a0b0c0d0e0f",
        b"\xff",
    ],
)
def test_keys_of_other_runs_and_programs_are_not_job_ids(key: bytes | None) -> None:
    """Another run may have a name that begins with this one's."""
    assert JobIds("b.night.").read(key) is None


def test_output_ids_are_read_back() -> None:
    """Ids of other programs have no digest."""
    assert digest_of_output(output_id(DIGEST)) == DIGEST
    for other in ("batch_req_123", "batch_req_sw12", output_id(DIGEST) + "0", None, 5):
        assert digest_of_output(other) is None


def test_faulty_lines_that_are_equal_have_different_digests() -> None:
    """Each of them has its own error line."""
    assert len({faulty_digest(b"{", number) for number in range(3)} | {faulty_digest(b"[", 0)}) == 4
