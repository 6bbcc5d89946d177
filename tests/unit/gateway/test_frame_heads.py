"""The heads of a client's frames: what aiohttp's reader would accept and RFC 6455 does not allow."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamworker.gateway.frame_heads import FrameHeads

KEY = bytes(4)
FINAL, MASKED = 0x80, 0x80
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10


def frame(payload: bytes = b"", opcode: int = TEXT, *, is_final: bool = True) -> bytes:
    """Return a frame of a client, with its length in as few bytes as possible."""
    size = len(payload)
    if size < 126:
        length = bytes([MASKED | size])
    elif size < 1 << 16:
        length = bytes([MASKED | 126]) + size.to_bytes(2, "big")
    else:
        length = bytes([MASKED | 127]) + size.to_bytes(8, "big")
    return bytes([FINAL * is_final | opcode]) + length + KEY + payload


def unmasked(payload: bytes = b"", opcode: int = TEXT, *, is_final: bool = True) -> bytes:
    """Return a frame as servers send it."""
    return bytes([FINAL * is_final | opcode, len(payload)]) + payload


def read(data: bytes, *cuts: int) -> tuple[int, str | None]:
    """Pass data on in parts; return how many bytes are valid, and the fault."""
    heads, valid = FrameHeads(), 0
    places = sorted({0, *cuts, len(data)})
    for begin, end in pairwise(places):
        valid += heads.valid_bytes(data[begin:end])
        if heads.fault is not None:
            break
    return valid, heads.fault


VALID = [
    b"",
    frame(),
    frame(b"x" * 125),
    frame(b"x" * 126),
    frame(b"x" * 65_535),
    frame(b"x" * 65_536),
    frame(b"", CLOSE) + frame(b"x", PING) + frame(b"", PONG) + frame(b"{}", BINARY),
    frame(b"a", is_final=False) + frame(b"b", CONTINUATION) + frame(b"c"),
    frame(b"", is_final=False) + frame(b"", CONTINUATION, is_final=False) + frame(b"", CONTINUATION),
    frame(b"a", is_final=False) + frame(b"hey", PING) + frame(b"b", CONTINUATION) + frame(b"", PING),
    b"\x81",
    frame(b"x" * 300)[:3],
    frame(b"x" * 300)[:200],
]

FAULTS = [
    (unmasked(b"{}"), "masked"),
    (unmasked(), "masked"),
    (unmasked(b"", PING), "masked"),
    (unmasked(b"\x03\xe8", CLOSE), "masked"),
    (unmasked(b"b", CONTINUATION), "masked"),
    (b"\x81\x7e", "masked"),
    (b"\x81\xfe" + (125).to_bytes(2, "big") + KEY, "few bytes"),
    (b"\x81\xfe" + (0).to_bytes(2, "big") + KEY, "few bytes"),
    (b"\x80\xfe" + (125).to_bytes(2, "big") + KEY, "few bytes"),
    (b"\x81\xff" + (65_535).to_bytes(8, "big") + KEY, "few bytes"),
    (b"\x81\xff" + (1 << 63).to_bytes(8, "big") + KEY, "few bytes"),
    (frame(b"", CONTINUATION), "continuation"),
    (frame(b"", CONTINUATION, is_final=False), "continuation"),
]
"""Frames, and a part of the fault."""


@pytest.mark.parametrize("data", VALID, ids=lambda data: data[:8].hex())
def test_frames_that_are_valid_pass_whole(data: bytes) -> None:
    """In whatever parts they are received."""
    assert read(data) == (len(data), None)
    assert read(data, *range(min(len(data), 500))) == (len(data), None)


@pytest.mark.parametrize("before", [b"", frame(b"{}"), frame(b"x" * 70_000), frame(b"", PING)], ids=len)
@pytest.mark.parametrize(("data", "fault"), FAULTS)
def test_frame_that_is_not_valid_is_a_fault(before: bytes, data: bytes, fault: str) -> None:
    """Everything before it may be read, and nothing of it."""
    valid, said = read(before + data + frame(b"behind"))
    assert valid == len(before)
    assert said is not None
    assert fault in said


@pytest.mark.parametrize("first", [frame(b"", is_final=False), frame(b"a", BINARY, is_final=False)])
@pytest.mark.parametrize("between", [b"", frame(b"", PING), frame(b"", CONTINUATION, is_final=False)])
@pytest.mark.parametrize("second", [frame(b"{}"), frame(b"{}", BINARY), frame(b"", is_final=False)])
def test_message_between_the_fragments_of_another_is_a_fault(
    first: bytes, between: bytes, second: bytes
) -> None:
    """Also where nothing of the other one was sent yet."""
    valid, fault = read(first + between + second)
    assert valid == len(first + between)
    assert fault == "a message must not begin before the last fragment of the one before"


FRAMES = st.lists(
    st.builds(
        frame,
        st.binary(max_size=300),
        st.sampled_from([CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG]),
        is_final=st.booleans(),
    )
    | st.sampled_from([data for data, _ in FAULTS]),
    max_size=8,
)


@given(FRAMES, st.lists(st.integers(0, 2000)))
def test_fault_does_not_depend_on_how_the_frames_are_received(frames: list[bytes], cuts: list[int]) -> None:
    """Of the frame at fault, the reader may have the bytes that were received before the fault could be seen."""
    data = b"".join(frames)
    valid, fault = read(data)
    in_parts, same = read(data, *(cut for cut in cuts if cut < len(data)))
    assert same == fault
    assert valid <= in_parts <= min(len(data), valid + 10)
