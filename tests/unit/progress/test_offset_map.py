"""Offset maps: a round trip for valid maps, an error for all others."""

from __future__ import annotations

import random
import zlib
from base64 import b64encode

import pytest

from streamworker.progress.offset_map import (
    FULL,
    LIMIT,
    MAX_OFFSETS,
    Damaged,
    OffsetMap,
    decode_map,
    encode_map,
)

PATTERNS: dict[str, list[int]] = {
    "nothing": [],
    "the committed offset itself": [0],
    "one, far away": [1 << 40],
    "a run": list(range(1, 5000)),
    "a run, far away": list(range(1 << 40, (1 << 40) + 300)),
    "every other": list(range(1, 10_000, 2)),
    "every other, beyond what a bitmap may hold": list(range(1, MAX_OFFSETS + 100_000, 2)),
    "thirds, beyond what a bitmap may hold": list(range(1, 2 * MAX_OFFSETS, 3)),
    "all but the first, as many as may be": list(range(1, MAX_OFFSETS + 1)),
    "squares": [number * number for number in range(1, 500)],
}


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("committed", [7, (1 << 62)])
def test_offset_map_round_trip(name: str, committed: int) -> None:
    """For every form, at any committed offset."""
    finished = frozenset(committed + offset for offset in PATTERNS[name])
    deliveries = {committed: 3, committed + 1: 1, committed + 200: 1000}
    offset_map = OffsetMap(finished, deliveries, "stamp.1")

    assert decode_map(committed, encode_map(committed, offset_map)) == offset_map


def test_offset_map_of_empty_metadata_is_empty() -> None:
    """Groups that another tool created have no metadata."""
    assert decode_map(5, "") == OffsetMap()


def test_offset_map_on_the_wire() -> None:
    """Later versions have to read the form `sw1`."""
    assert encode_map(10, OffsetMap(commit_id="s.1")) == "sw1:s.1::"
    assert encode_map(10, OffsetMap(frozenset({12, 13}), {10: 2}, "s.2")) == "sw1:s.2:rAgI=:LQAC"
    assert encode_map(10, OffsetMap(frozenset({11, 13, 15}))) == "sw1::bKg==:"
    assert encode_map(10, OffsetMap(frozenset({137, 138}))) == "sw1::rfwI=:"
    assert encode_map(10, OffsetMap(frozenset({138, 139}))) == "sw1::rgAEC:"
    assert decode_map(10, "sw1:s.2:bDA==:LQAC") == OffsetMap(frozenset({12, 13}), {10: 2}, "s.2")


@pytest.mark.parametrize(
    ("finished", "form"),
    [
        ([1, 3, 5], "b"),
        ([1000], "r"),
        ([offset for start in range(0, 900_000, 9000) for offset in range(start, start + 10)], "R"),
        ([offset for offset in range(3000) if offset % 5 % 2], "B"),
    ],
)
def test_offset_map_uses_the_shortest_form(finished: list[int], form: str) -> None:
    """Bitmap or run lengths, compressed or not."""
    assert encode_map(0, OffsetMap(frozenset(finished))).split(":")[2][0] == form


@pytest.mark.parametrize(
    ("what", "finished", "limit"),
    [
        ("all but one", [offset for offset in range(100_000) if offset != 50_000], 60),
        ("every other", list(range(1, 20_000, 2)), 100),
        ("chance, as much as fits", random.Random(1).sample(range(22_000), 11_000), LIMIT),
        ("chance, nine in ten", random.Random(2).sample(range(30_000), 27_000), LIMIT),
        ("a few, far apart", [number * 100_000 for number in range(700)], LIMIT),
    ],
)
def test_offset_map_of_a_hard_pattern_is_short_enough(what: str, finished: list[int], limit: int) -> None:
    """Twenty thousand offsets beyond the committed one fit in any pattern."""
    assert len(encode_map(0, OffsetMap(frozenset(finished), {0: 2}, "0123456789ab.100000"))) <= limit, what


@pytest.mark.parametrize("open_jobs", [256, 1500])
def test_offset_map_of_open_jobs_in_the_worst_pattern_fits_above_full(open_jobs: int) -> None:
    """From FULL on no record is accepted; open jobs may end in any order within the rest."""
    chance = random.Random(3)
    worst = 0
    for _ in range(20):
        ended = chance.sample(range(open_jobs), open_jobs // 2)
        still_open = {
            offset: chance.choice([1, 1, 1, 2]) for offset in range(open_jobs) if offset not in ended
        }
        worst = max(worst, len(encode_map(0, OffsetMap(frozenset(ended), still_open))))

    assert worst <= LIMIT - FULL


@pytest.mark.parametrize(
    "metadata",
    [
        " ",
        "sw1",
        "sw1:s",
        "sw1:s:::",
        "sw2:s::",
        "SW1:s::",
        "another tool's note",
        "sw1:s:x:",
        "sw1:s:b!!!!:",
        "sw1:s:bAQ:",
        "sw1:s:bé:",
        "sw1:s:BAQ==:",
        "sw1:s:rgA==:",
        "sw1:s:r//////////////////8=:",
        "sw1:s::LQ==LQ==",
        "sw1:s::LQE=",
        "sw1:s::LYA=",
        "sw1:s::egE=",
        "sw1:s::\N{ARABIC-INDIC DIGIT ONE}",
        "\ud800",
    ],
)
def test_offset_map_of_other_text_is_damaged(metadata: str) -> None:
    """Foreign, incomplete, or of a later version: the caller continues without a map."""
    with pytest.raises(Damaged):
        decode_map(0, metadata)


def test_offset_map_of_a_long_unknown_version_is_damaged_in_few_words() -> None:
    """The metadata is text of another program, and the reason is logged."""
    with pytest.raises(Damaged, match=f"is of version '{'x' * 16}'$"):
        decode_map(0, "x" * 4000 + ":a:b:c")


@pytest.mark.parametrize("last", [MAX_OFFSETS - 1, MAX_OFFSETS])
def test_offset_map_at_the_limit_of_a_bitmap_is_read_back(last: int) -> None:
    """The writer takes no form that the reader does not accept."""
    finished = frozenset(range(last % 2, last + 1, 2))

    assert decode_map(0, encode_map(0, OffsetMap(finished))).finished == finished


@pytest.mark.parametrize(("excess", "is_read"), [(0, True), (1, False)])
def test_offset_map_with_more_offsets_than_allowed_is_damaged(excess: int, is_read: bool) -> None:
    """The runs add up; gaps between them do not count."""
    metadata = encode_map(0, OffsetMap(frozenset({*range(MAX_OFFSETS - 1 + excess), 3 * MAX_OFFSETS})))
    if is_read:
        assert len(decode_map(0, metadata).finished) == MAX_OFFSETS
    else:
        with pytest.raises(Damaged, match="impossible length"):
            decode_map(0, metadata)


@pytest.mark.parametrize("form", ["B", "R"])
def test_offset_map_that_inflates_too_far_is_damaged(form: str) -> None:
    """Four thousand characters must not inflate to gigabytes."""
    bomb = b64encode(zlib.compress(b"\xff" * 3_000_000, 9)).decode()
    assert len(bomb) < LIMIT

    with pytest.raises(Damaged, match="decompress"):
        decode_map(0, f"sw1:s:{form}{bomb}:")
    with pytest.raises(Damaged, match="decompress"):
        decode_map(0, f"sw1:s::{b64encode(b'z' + zlib.compress(bytes(3_000_000), 9)).decode()}")


def test_offset_map_with_many_long_runs_is_damaged() -> None:
    """Each run has a possible length, but their sum does not."""
    a_million = b"\x80\x80\x40"
    runs = zlib.compress((b"\x00" + a_million) * 30_000, 9)
    metadata = f"sw1:s:R{b64encode(runs).decode()}:"
    assert len(metadata) < LIMIT

    with pytest.raises(Damaged, match="impossible length"):
        decode_map(0, metadata)
