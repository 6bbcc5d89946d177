"""Offset maps survive a round trip, and no text makes decoding fail otherwise."""

from __future__ import annotations

import string
import zlib
from base64 import b64encode

from hypothesis import given
from hypothesis import strategies as st

from streamworker.progress.offset_map import LIMIT, MAX_OFFSETS, Damaged, OffsetMap, decode_map, encode_map
from streamworker.progress.partition import PartitionProgress

_OFFSETS = st.integers(0, 300) | st.integers(0, 1 << 45)
_RUNS = st.tuples(_OFFSETS, st.integers(1, 400)).map(lambda run: range(run[0], run[0] + run[1]))
_FINISHED = st.lists(_RUNS, max_size=12).map(lambda runs: frozenset(offset for run in runs for offset in run))
_STAMPS = st.text(string.ascii_lowercase + string.digits + ".", max_size=20)
_MAPS = st.builds(
    OffsetMap, _FINISHED, st.dictionaries(_OFFSETS, st.integers(1, 1 << 20), max_size=40), _STAMPS
)
_TEXT = st.text(max_size=60)
_BYTES = st.binary(max_size=40).map(lambda data: b64encode(data).decode())
_PACKED = st.binary(max_size=40).map(lambda data: b64encode(zlib.compress(data)).decode())
_COUNTS = st.tuples(st.sampled_from([b"z", b"-", b""]), st.binary(max_size=30)).map(
    lambda parts: b64encode(parts[0] + (zlib.compress(parts[1]) if parts[0] == b"z" else parts[1])).decode()
)
_NEARLY = st.tuples(
    st.sampled_from(["sw1", "sw2", "", "sw1 "]),
    _STAMPS,
    st.tuples(st.sampled_from(["b", "B", "r", "R", "x", ""]), _BYTES | _PACKED | _TEXT).map("".join),
    _COUNTS | _BYTES | _TEXT,
).map(":".join)


@given(committed=st.integers(0, 1 << 62), offset_map=_MAPS)
def test_offset_map_of_any_offsets_is_read_as_it_was_written(committed: int, offset_map: OffsetMap) -> None:
    """Commit id, finished offsets and counts, relative to any committed offset, in plain ASCII."""
    moved = OffsetMap(
        frozenset(committed + offset for offset in offset_map.finished),
        {committed + offset: count for offset, count in offset_map.deliveries.items()},
        offset_map.commit_id,
    )
    text = encode_map(committed, moved)

    assert text.isascii()
    assert decode_map(committed, text) == moved


@given(committed=st.integers(0, 1 << 62), metadata=_TEXT | _NEARLY)
def test_offset_map_of_any_text_is_read_or_damaged(committed: int, metadata: str) -> None:
    """No other exception is raised, and the result is bounded."""
    try:
        offset_map = decode_map(committed, metadata)
    except Damaged:
        return

    assert len(offset_map.finished) <= MAX_OFFSETS
    assert all(offset >= committed for offset in offset_map.finished | offset_map.deliveries.keys())


@given(
    offset_map=_MAPS,
    place=st.integers(0, 5000),
    character=st.characters(max_codepoint=255),
    cut=st.booleans(),
)
def test_offset_map_with_one_fault_is_read_or_damaged(
    offset_map: OffsetMap, place: int, character: str, cut: bool
) -> None:
    """A changed character or a missing end is detected or harmless."""
    text = encode_map(0, offset_map)
    place %= len(text)
    try:
        decode_map(0, text[:place] if cut else text[:place] + character + text[place + 1 :])
    except Damaged as fault:
        assert "offset map" in str(fault)  # noqa: PT017 - it may also raise nothing


@given(
    taken=st.lists(st.integers(1, 50_000), max_size=300),
    ended=st.lists(st.booleans(), min_size=300, max_size=300),
)
def test_progress_of_any_offsets_makes_points_that_the_broker_accepts(
    taken: list[int], ended: list[bool]
) -> None:
    """The metadata is within the limit and never lists an unfinished offset as finished."""
    progress = PartitionProgress(0, OffsetMap(), commit_id="0123456789ab")
    offsets = [sum(taken[: index + 1]) for index in range(len(taken))]
    for offset in offsets:
        progress.begin(offset)
        progress.count(offset)
    done = {offset for offset, is_ended in zip(offsets, ended, strict=False) if is_ended}
    for offset in done:
        progress.finish(offset)
    point = progress.point()

    assert len(point.metadata) <= LIMIT
    known = decode_map(*point)
    claimed = {offset for offset in offsets if offset < point.offset or offset in known.finished}
    assert claimed == done if not progress.is_cut else claimed <= done
