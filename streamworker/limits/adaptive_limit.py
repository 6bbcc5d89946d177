"""How many calls an upstream takes that does not say so: learned from the calls that it refuses with 429.

Three limits are learned, because a 429 does not name the one that was exceeded. After a refusal nothing is called until
the pause ends; then one call at a time, and more with every answer. The streams that were open at a refusal bound those
that may be open. A refusal below that bound shows a limit per time: calls then keep a distance from one another.
"""

from __future__ import annotations

from collections import deque
from math import inf

__all__ = ["AdaptiveLimit", "CallRate", "RateLimitPause"]

INITIAL_UNANSWERED = 16.0
"""Calls without an answer in a burst to an upstream that has answered none."""

ANSWER_GROWTH = 0.25
"""How many more calls may be unanswered after each answer."""

PROBE_S = 10.0
"""Seconds without a refusal until one more stream is tried; halved by each stream, longer after a refusal."""

MAX_PROBE_S = 60.0
MIN_PROBE_S = 0.1

PAUSE_S = 0.5
PAUSE_GROWTH = 3.0
MAX_PAUSE_S = 30.0
MAX_ADVISED_PAUSE_S = 120.0
"""The longest pause that an upstream may ask for."""

JITTER = 0.1

SPAN_S = 60.0
REFUSAL_SPAN_S = 30.0
MAX_INTERVAL_S = 10.0
MIN_INTERVAL_S = 0.005
INTERVAL_GROWTH = 1.3
INTERVAL_DECAY = 0.995
MAX_ANSWERS = 100_000
FEW_ANSWERS = 5
MAX_FUTILE = 6
LONGEST_SHARE = 3.0
"""By how much the distance may grow beyond its first value."""

FUTILE_SPAN_S = 60.0
RECOVERY_DECAY = 0.9


class RateLimitPause:
    """When an upstream may be called again after a 429. Pauses grow while every call is refused."""

    def __init__(self) -> None:
        self.until = -inf
        self._began = -inf
        self._pauses = 0

    def wait_s(self, now: float) -> float:
        """Return the seconds until the pause ends."""
        return max(0.0, self.until - now)

    def refused(self, now: float, *, began: float, advised_s: float | None, random: float) -> bool:
        """Record a 429; return whether it begins a pause.

        A call that began before the present pause shows nothing new: it extends the pause only if the upstream asks
        for that. `advised_s` is the wait that the upstream asked for; `random` is in [0, 1).
        """
        is_new = began > self._began
        own_s = 0.0
        if is_new:
            self._began = now
            self._pauses += 1
            own_s = min(MAX_PAUSE_S, PAUSE_S * PAUSE_GROWTH ** min(self._pauses - 1, 16))
        asked_s = min(advised_s or 0.0, MAX_ADVISED_PAUSE_S)
        self.until = max(self.until, now + max(own_s, asked_s) * (1 + JITTER * random))
        return is_new

    @property
    def is_repeated(self) -> bool:
        """Whether no call was answered since the last 429."""
        return self._pauses > 0

    def answered(self) -> None:
        """Record that a call was not refused."""
        self._pauses = 0


class AdaptiveLimit:
    """How many streams may be open, and how many calls may be without an answer."""

    def __init__(self, ceiling: int) -> None:
        self.ceiling = ceiling
        self.answered_streams = 0
        """Open streams that the upstream has answered."""
        self.unanswered = 0
        """Calls without an answer."""
        self._proved = (
            ceiling  # streams that the upstream allowed at once; the ceiling until the first refusal
        )
        self._bound = ceiling  # at least as many: one more is tried now and then
        self._window = min(INITIAL_UNANSWERED, float(ceiling))
        self._fast_until = 0.0  # below it the window grows by one with each answer
        self._probe_s = PROBE_S
        self._changed_at = -inf
        self._has_answers = (
            True  # since the last refusal: an upstream that refuses every call gets no more of them
        )

    @property
    def is_limited(self) -> bool:
        """Whether the upstream has refused calls, and fewer streams than the ceiling may be open."""
        return self._bound < self.ceiling

    def limit(self, now: float) -> int:
        """Return the number of streams that may be open now, at least one."""
        self._grow(now)
        return self._bound

    def wait_s(self, open_streams: int, now: float) -> float:
        """Return the seconds until one more call may begin if no call ends or is answered; 0 for now."""
        if open_streams >= self.ceiling or self.unanswered >= int(self._window):
            return inf
        self._grow(now)
        if open_streams < self._bound:
            return 0.0
        is_growing = self._has_answers and open_streams == self._bound
        return max(0.0, self._changed_at + self._probe_s - now) if is_growing else inf

    def enter(self) -> None:
        """Begin a call."""
        self.unanswered += 1

    def answered(self) -> None:
        """Record that a call was answered with a stream."""
        self.unanswered -= 1
        self.answered_streams += 1
        self._has_answers = True
        growth = 1.0 if self._window < self._fast_until else ANSWER_GROWTH
        self._window = min(float(self.ceiling), self._window + growth)
        self._proved = max(self._proved, self.answered_streams)
        self._bound = max(self._bound, self._proved)

    def left(self, *, was_answered: bool) -> None:
        """End a call."""
        if was_answered:
            self.answered_streams -= 1
        else:
            self.unanswered -= 1

    def is_proved(self, open_streams: int) -> bool:
        """Return whether the upstream has allowed as many streams at once, since it first refused a call."""
        return self.is_limited and open_streams <= self._proved

    def refused(self, now: float, *, cut: float = 1.0) -> None:
        """Record a 429: no more streams than the upstream has allowed, times `cut`, may be open."""
        self._fast_until, self._window = self._window / 2, 1.0
        proved = self._proved if self.is_limited else self.answered_streams
        if self._bound > self._proved:  # one stream more was tried in vain
            self._probe_s = min(MAX_PROBE_S, max(PROBE_S, 4 * self._probe_s))
        self._proved = max(1, self.answered_streams, int(cut * proved))
        self._bound, self._changed_at, self._has_answers = self._proved, now, False

    def restart(self) -> None:
        """Begin with few calls, because the upstream was held."""
        self._window = min(self._window, INITIAL_UNANSWERED)

    def _grow(self, now: float) -> None:
        while self._has_answers and self._bound < self.ceiling and now - self._changed_at >= self._probe_s:
            self._changed_at += self._probe_s
            self._bound += 1
            self._probe_s = max(MIN_PROBE_S, self._probe_s / 2)


class CallRate:
    """The distance between two calls at an upstream that limits calls per time; none until it refuses calls twice.

    An upstream may refuse a share of all calls, however few they are. If slower calls are refused as often, the distance
    is given up for `FUTILE_SPAN_S`.
    """

    def __init__(self) -> None:
        self.interval_s = 0.0
        self._longest_s = MAX_INTERVAL_S
        self._next_at = -inf
        self._answers: deque[float] = deque()
        self._refused_at = -inf
        self._answers_since = 0  # since the last refusal
        self._futile = 0  # refusals in a row with few answers between them, although the distance grew
        self._free_until = -inf

    def wait_s(self, now: float) -> float:
        """Return the seconds until the next call may begin."""
        return max(0.0, self._next_at - now)

    def enter(self, now: float) -> None:
        """Begin a call."""
        self._next_at = now + self.interval_s

    def answered(self, now: float) -> None:
        """Record that a call was not refused: the distance shrinks slowly, and fast after a minute without a refusal."""
        self._answers_since += 1
        self._answers.append(now)
        while self._answers and (self._answers[0] <= now - SPAN_S or len(self._answers) > MAX_ANSWERS):
            self._answers.popleft()
        if self.interval_s:
            self.interval_s *= RECOVERY_DECAY if self._refused_at < now - SPAN_S else INTERVAL_DECAY
            if self.interval_s < MIN_INTERVAL_S:
                self.interval_s = 0.0

    def refused(self, now: float) -> None:
        """Record a 429 below the bound on streams."""
        answers, since_s = self._answers_since, now - self._refused_at
        self._answers_since, self._refused_at = 0, now
        if self.interval_s:
            self._slow_down(answers, now)
        elif since_s < REFUSAL_SPAN_S and now >= self._free_until:
            # Without an answer since the last refusal, a whole minute's calls are spent.
            recent = sum(answer > now - SPAN_S for answer in self._answers)
            interval_s = since_s / answers if answers else SPAN_S / max(1, recent)
            self.interval_s, self._futile = min(MAX_INTERVAL_S, interval_s), 0
            self._longest_s = min(MAX_INTERVAL_S, LONGEST_SHARE * self.interval_s)

    def _slow_down(self, answers: int, now: float) -> None:
        if not answers:  # nothing new: the calls since the last refusal were refused too
            return
        self.interval_s = min(self._longest_s, self.interval_s * INTERVAL_GROWTH)
        self._futile = self._futile + 1 if answers < FEW_ANSWERS else 0
        if self._futile >= MAX_FUTILE:
            self.interval_s, self._futile, self._free_until = 0.0, 0, now + FUTILE_SPAN_S
