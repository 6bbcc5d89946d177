"""Control records."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.wire.control import NO_REASON, Cancel, read_control, write_cancel


def test_cancel_is_written_as_the_contract_says() -> None:
    """v, type, job_id, reason."""
    assert json.loads(write_cancel("j", "late")) == {
        "v": 1,
        "type": "cancel",
        "job_id": "j",
        "reason": "late",
    }


def test_cancel_without_a_reason_has_one_all_the_same() -> None:
    """The terminal event has something to say."""
    assert read_control(b'{"v":1,"type":"cancel","job_id":"j"}') == Cancel("j", NO_REASON)


def test_members_that_are_not_known_are_ignored() -> None:
    """New ones may come within v 1."""
    assert read_control(b'{"v":1,"type":"cancel","job_id":"j","by":"me"}').job_id == "j"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"[]",
        b'{"type":"pause","job_id":"j"}',
        b'{"v":2,"type":"cancel","job_id":"j"}',
        b'{"type":"cancel"}',
    ],
)
def test_what_is_no_cancellation_is_refused(value: bytes) -> None:
    """With a reason, for the log."""
    with pytest.raises(ValueError, match=r"."):
        read_control(value)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(value: bytes) -> None:
    """Nothing else."""
    try:
        read_control(value)
    except ValueError:
        return
    assert json.loads(value)["type"] == "cancel"
