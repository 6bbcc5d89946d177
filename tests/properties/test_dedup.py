"""The remembered job ids against a model that searches the whole log."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamworker.progress.dedup import RecentIds

RECORDS = st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 4]), st.sampled_from("abcdef")), max_size=60)
"""A log: the gap before each record, and its job id."""


@given(records=RECORDS, window=st.integers(0, 12), steps=st.lists(st.integers(0, 6), max_size=120))
def test_duplicate_is_found_where_the_log_has_the_id_within_the_window(
    records: list[tuple[int, str]], window: int, steps: list[int]
) -> None:
    """A record that is delivered for the first time is looked up in the log; one delivered again is never a duplicate.

    A step of n > 1 seeks back by n - 1 records before the delivery; 0 and 1 go on.
    """
    log, end = [], 0
    for gap, job_id in records:
        log.append((end + gap, job_id))
        end += gap + 1
    ids = RecentIds(window)
    place = delivered = 0
    for back in steps:
        place = max(0, place - max(0, back - 1))
        if place == len(log):
            continue
        offset, job_id = log[place]
        before = [at for at, known in log[:place] if known == job_id and offset - at <= window]
        expected = max(before, default=None) if place == delivered else None
        assert ids.earlier(job_id, offset) == expected
        ids.remember(job_id, offset)
        assert len(ids) <= window
        place += 1
        delivered = max(delivered, place)
