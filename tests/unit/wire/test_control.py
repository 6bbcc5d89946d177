"""Control records."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.wire.control import NO_REASON, Cancel, read_control, write_cancel


def test_write_cancel_has_the_documented_members() -> None:
    """v, type, job_id, reason."""
    assert json.loads(write_cancel("j", "late")) == {
        "v": 1,
        "type": "cancel",
        "job_id": "j",
        "reason": "late",
    }


@pytest.mark.parametrize("reason", [None, ""])
def test_write_cancel_without_a_reason_has_a_default(reason: str | None) -> None:
    """The terminal event's message is never empty."""
    assert json.loads(write_cancel("j", reason))["reason"] == "cancelled by a control record"
    assert read_control(b'{"v":1,"type":"cancel","job_id":"j"}') == Cancel("j", NO_REASON)


def test_read_control_ignores_unknown_members() -> None:
    """Version 1 may gain members."""
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
def test_read_control_of_another_value_raises(value: bytes) -> None:
    """The message gives the reason, for the log."""
    with pytest.raises(ValueError, match=r"."):
        read_control(value)


@given(st.binary(max_size=60))
def test_read_control_of_any_bytes_returns_or_raises_value_error(value: bytes) -> None:
    """No other exception is raised."""
    try:
        read_control(value)
    except ValueError:
        return
    assert json.loads(value)["type"] == "cancel"
