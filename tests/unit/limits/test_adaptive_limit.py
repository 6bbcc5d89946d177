"""What is learned from calls that an upstream refuses with 429."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING

import pytest

from streamworker.limits.adaptive_limit import (
    INITIAL_UNANSWERED,
    MAX_ADVISED_PAUSE_S,
    MAX_INTERVAL_S,
    MAX_PAUSE_S,
    MAX_PROBE_S,
    MIN_PROBE_S,
    PAUSE_S,
    PROBE_S,
    AdaptiveLimit,
    CallRate,
    RateLimitPause,
)
from tests.unit.limits.servers import Both, Bucket, PerMinute, Share, Slots, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.unit.limits.servers import Server


def answer(limit: AdaptiveLimit, count: int) -> None:
    """Let calls begin and be answered."""
    for _ in range(count):
        limit.enter()
        limit.answered()


@pytest.mark.parametrize("round_trip_s", [0.002, 0.05, 0.3])
@pytest.mark.parametrize("stream_s", [0.3, 1, 5])
@pytest.mark.parametrize(
    ("server", "least_s"),
    [
        (PerMinute, 180),
        (lambda: PerMinute(1), 180),
        (lambda: PerMinute(is_exact=True), 180),
        (lambda: Bucket(60), 140),
        (lambda: Bucket(5), 195),
        (lambda: Slots(4), 50),
        (lambda: Slots(16), 12.5),
        (lambda: Both(PerMinute(), Slots(4)), 180),
    ],
    ids=["per minute", "per minute, 1 s", "per minute, exact", "bucket", "small bucket", "4", "16", "both"],
)
def test_limits_of_an_unknown_upstream_are_learned_with_few_calls(
    server: Callable[[], Server], least_s: float, stream_s: float, round_trip_s: float
) -> None:
    """200 jobs take about 1.2 times as many calls, and not much longer than the limit requires."""
    outcome = run(server(), round_trip_s=round_trip_s, stream_s=stream_s)
    shortest_s = max(least_s, least_s * stream_s if least_s <= 50 else 0)

    assert outcome.calls <= 250
    assert outcome.seconds <= 1.9 * shortest_s + 20


def test_streams_are_bounded_by_the_ceiling_only_until_the_first_refusal() -> None:
    """At the ceiling, only the end of a stream makes room."""
    limit = AdaptiveLimit(4)
    answer(limit, 4)

    assert [limit.wait_s(streams, 0) for streams in range(5)] == [0, 0, 0, 0, inf]
    assert not limit.is_limited


def test_streams_after_a_refusal_are_bounded_by_those_that_were_open() -> None:
    """One more is tried after a while, and the next one sooner; none while no call is answered."""
    limit = AdaptiveLimit(100)
    answer(limit, 4)
    limit.enter()
    limit.refused(0)
    limit.left(was_answered=False)
    assert limit.limit(100 * PROBE_S) == 4
    limit.left(was_answered=True)
    answer(limit, 1)

    assert (limit.limit(0), limit.is_limited) == (4, True)
    assert limit.wait_s(3, 0) == 0
    assert limit.wait_s(4, 0) == PROBE_S
    assert limit.limit(PROBE_S) == 5
    assert limit.limit(1.5 * PROBE_S) == 6
    assert limit.limit(100 * PROBE_S) == 100


def test_streams_that_are_answered_after_a_refusal_prove_their_number() -> None:
    """Answers to calls of the same burst may arrive after its first refusal."""
    limit = AdaptiveLimit(100)
    for _ in range(8):
        limit.enter()
    limit.refused(0)
    for _ in range(3):
        limit.answered()

    assert limit.limit(0) == 3


def test_streams_tried_in_vain_are_tried_less_often() -> None:
    """Each refusal costs a call."""
    limit = AdaptiveLimit(100)
    answer(limit, 4)
    limit.refused(0)
    limit.left(was_answered=True)
    answer(limit, 1)
    assert limit.limit(PROBE_S) == 5
    limit.refused(PROBE_S)
    limit.left(was_answered=True)
    answer(limit, 1)

    assert limit.limit(2 * PROBE_S) == 4
    assert limit.limit(3 * PROBE_S) == 5


def test_unanswered_calls_are_few_in_a_burst_and_one_after_a_refusal() -> None:
    """The window grows with every answer."""
    limit = AdaptiveLimit(100)
    for _ in range(int(INITIAL_UNANSWERED)):
        assert limit.wait_s(limit.unanswered, 0) == 0
        limit.enter()
    assert limit.wait_s(limit.unanswered, 0) == inf
    for _ in range(4):
        limit.answered()
    assert limit.wait_s(16, 0) == 0
    limit.refused(0)
    for _ in range(12):
        limit.left(was_answered=False)
    limit.enter()

    assert limit.wait_s(1, 0) == inf


def test_pause_lasts_as_long_as_the_upstream_asks_and_a_little_more() -> None:
    """Workers and waiters do not return in the same moment."""
    pauses = [RateLimitPause() for _ in range(2)]
    for pause, random in zip(pauses, (0.0, 0.5), strict=True):
        assert pause.refused(1, began=0.5, advised_s=20, random=random)

    assert [pause.wait_s(1) for pause in pauses] == [20, 21]


def test_pause_without_advice_grows_while_every_call_is_refused() -> None:
    """An answer ends the series."""
    pause, now, waits = RateLimitPause(), 0.0, []
    for _ in range(6):
        pause.refused(now, began=now, advised_s=None, random=0)
        waits.append(pause.wait_s(now))
        now += waits[-1] + 0.001
    pause.answered()
    pause.refused(now, began=now, advised_s=None, random=0)

    assert waits == [pytest.approx(wait) for wait in (0.5, 1.5, 4.5, 13.5, 30, MAX_PAUSE_S)]
    assert pause.wait_s(now) == PAUSE_S


def test_pause_is_not_extended_by_calls_that_began_before_it() -> None:
    """Refusals of one burst are one refusal; only the upstream's own advice extends the pause."""
    pause = RateLimitPause()
    assert pause.refused(1, began=0, advised_s=None, random=0)
    assert not pause.refused(1.1, began=0.9, advised_s=None, random=0)
    assert pause.until == 1.5
    assert not pause.refused(1.2, began=0.9, advised_s=7, random=0)

    assert pause.until == pytest.approx(8.2)


def test_pause_is_bounded() -> None:
    """An upstream cannot stop its calls for days."""
    pause = RateLimitPause()
    pause.refused(0, began=0, advised_s=1e9, random=0)

    assert pause.wait_s(0) == MAX_ADVISED_PAUSE_S


def test_rate_is_that_of_the_calls_that_were_accepted() -> None:
    """The second refusal within half a minute shows that the limit is one per time."""
    rate = CallRate()
    for second in range(30):
        rate.answered(second)
    rate.refused(30)
    assert rate.interval_s == 0
    rate.refused(32)
    rate.enter(32)

    assert rate.interval_s == 2
    assert rate.wait_s(32) == 2


def test_rate_grows_with_answers_and_is_free_again_in_the_end() -> None:
    """Slowly at first; fast after a minute without a refusal."""
    rate = CallRate()
    rate.answered(0)
    rate.refused(0)
    rate.refused(1)
    first = rate.interval_s
    rate.answered(2)
    assert 0.99 * first < rate.interval_s < first
    for _ in range(100):
        rate.answered(100)

    assert rate.interval_s == 0


def test_rate_falls_once_per_series_of_refusals() -> None:
    """Calls that are refused without an answer between them show nothing new about the rate."""
    rate = CallRate()
    for second in range(60):
        rate.answered(second)
    rate.refused(60)
    rate.refused(61)
    interval_s = rate.interval_s
    rate.refused(65)
    assert rate.interval_s == interval_s
    rate.answered(66)
    rate.refused(67)

    assert rate.interval_s > interval_s


@pytest.mark.parametrize(("share", "most_s"), [(0.1, 300), (1 / 3, 900)])
def test_upstream_that_refuses_a_share_of_all_calls_is_not_starved(share: float, most_s: float) -> None:
    """Slower calls are refused as often, so the distance between calls is given up."""
    outcome = run(Share(share), jobs=300, round_trip_s=0.05, stream_s=0.5)

    assert outcome.calls <= 1.2 * 300 / (1 - share)
    assert outcome.seconds <= most_s


# Bounds of what is learned


def refuse(limit: AdaptiveLimit, now: float, *, cut: float = 1.0) -> None:
    """Let a call begin and be refused."""
    limit.enter()
    limit.refused(now, cut=cut)
    limit.left(was_answered=False)


def test_bound_is_not_cut_below_the_streams_that_are_open() -> None:
    """The upstream has just shown that it allows them: a cut bound would forbid the next call for nothing."""
    limit = AdaptiveLimit(100)
    answer(limit, 10)
    refuse(limit, 0)
    refuse(limit, 1, cut=0.5)
    assert limit.limit(1) == 10

    for _ in range(8):
        limit.left(was_answered=True)
    refuse(limit, 2, cut=0.5)
    assert limit.limit(2) == 5


def test_no_stream_is_tried_above_the_bound_before_a_call_was_answered() -> None:
    """An upstream that refuses every call gets no more of them with time."""
    limit = AdaptiveLimit(100)
    answer(limit, 3)
    refuse(limit, 0)
    assert limit.wait_s(3, 5) == inf

    limit.left(was_answered=True)
    answer(limit, 1)
    assert limit.wait_s(3, 5) == pytest.approx(PROBE_S - 5)
    assert limit.wait_s(4, 5) == inf


def test_streams_tried_one_after_another_are_at_least_a_tenth_of_a_second_apart() -> None:
    """The time between them is halved each time: without a floor all of the ceiling would be allowed at once."""
    limit = AdaptiveLimit(1000)
    answer(limit, 1)
    refuse(limit, 0)
    limit.left(was_answered=True)
    answer(limit, 1)
    first = limit.limit(2 * PROBE_S)

    assert limit.limit(2 * PROBE_S + 10) - first <= 10 / MIN_PROBE_S


def test_streams_tried_in_vain_are_tried_again_within_a_minute() -> None:
    """However often that failed: the upstream may have grown."""
    limit, now = AdaptiveLimit(100), 0.0
    answer(limit, 4)
    refuse(limit, now)
    for _ in range(5):
        limit.left(was_answered=True)
        answer(limit, 1)
        waited_s = limit.wait_s(4, now)
        assert waited_s <= MAX_PROBE_S
        now += waited_s
        assert limit.limit(now) == 5
        refuse(limit, now)


def test_calls_without_an_answer_never_exceed_the_ceiling_in_what_is_remembered() -> None:
    """After a refusal they grow fast up to half of what was allowed before, and never to more."""
    limit = AdaptiveLimit(8)
    for _ in range(200):
        answer(limit, 1)
        limit.left(was_answered=True)
    refuse(limit, 0)
    for _ in range(5):
        answer(limit, 1)
        limit.left(was_answered=True)
    for _ in range(4):
        assert limit.wait_s(0, 0) == 0
        limit.enter()

    assert limit.wait_s(0, 0) == inf


def test_call_that_began_with_the_pause_does_not_extend_it() -> None:
    """Calls that leave in one moment are refused in another one: they show one refusal, not many."""
    pause = RateLimitPause()
    assert pause.refused(5.0, began=1.0, advised_s=None, random=0.0)

    assert not pause.refused(6.0, began=5.0, advised_s=None, random=0.0)
    assert pause.wait_s(6.0) == 0


def test_streams_of_an_upstream_that_refuses_nothing_are_not_proved() -> None:
    """Only a refusal shows that an upstream has a bound, below which another refusal means another limit."""
    limit = AdaptiveLimit(10)
    answer(limit, 3)
    assert not limit.is_proved(1)

    refuse(limit, 0)
    assert limit.is_proved(3)
    assert not limit.is_proved(4)


def test_upstream_that_was_held_is_called_as_a_new_one() -> None:
    """It may have restarted: a burst of all waiting jobs would end it again."""
    limit = AdaptiveLimit(1000)
    for _ in range(400):
        answer(limit, 1)
        limit.left(was_answered=True)
    limit.restart()
    for _ in range(int(INITIAL_UNANSWERED)):
        assert limit.wait_s(limit.unanswered, 0) == 0
        limit.enter()

    assert limit.wait_s(limit.unanswered, 0) == inf


def test_first_distance_is_bounded() -> None:
    """One answer between two refusals says little about the rate."""
    rate = CallRate()
    rate.refused(0)
    rate.answered(1)
    rate.refused(29)

    assert rate.interval_s == MAX_INTERVAL_S


@pytest.mark.parametrize(("answers", "is_given_up"), [(1, True), (4, True), (5, False)])
def test_distance_is_given_up_after_six_refusals_with_few_answers_between_them(
    answers: int, is_given_up: bool
) -> None:
    """Slower calls are refused as often: the upstream limits something else."""
    rate, now = CallRate(), 0.0
    rate.refused(now)
    for number in range(7):
        assert rate.interval_s or number == 0
        for _ in range(answers):
            rate.answered(now := now + 0.5)
        rate.refused(now := now + 0.5)

    assert (rate.interval_s == 0.0) is is_given_up


def test_remembered_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upstream of ten thousand calls a second must not fill the memory within the minute that counts."""
    monkeypatch.setattr("streamworker.limits.adaptive_limit.MAX_ANSWERS", 100)
    rate = CallRate()
    for number in range(1000):
        rate.answered(number / 1000)

    assert len(rate._answers) == 100
