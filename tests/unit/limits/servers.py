"""Upstreams that limit their calls, simulated together with a limiter on a clock of their own."""

from __future__ import annotations

from heapq import heappop, heappush
from math import inf
from random import Random
from typing import Any, NamedTuple, Protocol

import msgspec

from streamworker.limits.circuit import Circuit
from streamworker.limits.limiter import UpstreamLimiter, Verdict
from streamworker.model import ErrorCode, JobError


class Server(Protocol):
    """Accepts or refuses calls."""

    def call(self, now: float) -> tuple[bool, float | None]:
        """Return whether the call is accepted, and the `retry-after` of a refusal."""
        ...

    def end(self, now: float) -> None:
        """An accepted call has ended."""
        ...


class PerMinute:
    """60 calls in any 60 seconds. `after_s` is the `retry-after` of a refusal; None sends the exact time."""

    def __init__(self, after_s: float | None = None, *, is_exact: bool = False) -> None:
        self._after_s, self._is_exact = after_s, is_exact
        self._calls: list[float] = []

    def call(self, now: float) -> tuple[bool, float | None]:
        self._calls = [call for call in self._calls if call > now - 60]
        if len(self._calls) < 60:
            self._calls.append(now)
            return True, None
        return False, self._calls[0] + 60 - now if self._is_exact else self._after_s

    def end(self, now: float) -> None:
        pass


class Bucket:
    """A token bucket that is refilled with one call per second."""

    def __init__(self, capacity: int) -> None:
        self._capacity = self._tokens = float(capacity)
        self._at = 0.0

    def call(self, now: float) -> tuple[bool, float | None]:
        self._tokens = min(self._capacity, self._tokens + now - self._at)
        self._at = now
        is_accepted = self._tokens >= 1
        self._tokens -= is_accepted
        return is_accepted, None

    def end(self, now: float) -> None:
        pass


class Share:
    """Refuses a share of all calls at random."""

    def __init__(self, share: float) -> None:
        self._share, self._random = share, Random(1)

    def call(self, now: float) -> tuple[bool, float | None]:
        return self._random.random() >= self._share, None

    def end(self, now: float) -> None:
        pass


class Slots:
    """A bound on the streams that are open at once."""

    def __init__(self, count: int) -> None:
        self.free = count

    def call(self, now: float) -> tuple[bool, float | None]:
        is_accepted = self.free > 0
        self.free -= is_accepted
        return is_accepted, None

    def end(self, now: float) -> None:
        self.free += 1


class Both:
    """A bound on calls per minute and one on streams."""

    def __init__(self, first: PerMinute, second: Slots) -> None:
        self._first, self._second = first, second

    def call(self, now: float) -> tuple[bool, float | None]:
        if not self._second.free:
            return False, None
        accepted = self._first.call(now)
        if accepted[0]:
            self._second.call(now)
        return accepted

    def end(self, now: float) -> None:
        self._second.end(now)


class Outcome(NamedTuple):
    """How many calls it took until all jobs were done, and how long, in seconds."""

    calls: int
    seconds: float


def run(  # noqa: C901 - one branch per happening
    server: Server,
    *,
    jobs: int = 200,
    round_trip_s: float,
    stream_s: float,
    seed: int = 1,
    delay_s: float = 0.0,
) -> Outcome:
    """Run jobs at a server, through a limiter that knows nothing about it.

    The answer to a refused call takes up to `delay_s` longer: other calls are accepted in between.
    """
    limiter = UpstreamLimiter("a", circuit=Circuit(failures=10, open_s=5), max_streams=256)
    random = Random(seed)
    happenings: list[tuple[float, int, str, Any]] = []
    now, calls, waiting, done, number = 0.0, 0, jobs, 0, 0

    def happen(at: float, what: str, subject: Any = None) -> None:
        nonlocal number
        number += 1
        heappush(happenings, (at, number, what, subject))

    while done < jobs:
        wait_s = inf
        while waiting and not (wait_s := limiter.wait_s(None, now)):
            happen(now + round_trip_s / 2, "arrives", limiter.enter(None, now))
            waiting, calls = waiting - 1, calls + 1
        following = now + max(wait_s, 0.001) if waiting else inf
        assert happenings or following < inf, "no call is in progress and none will begin"
        now = min(following, happenings[0][0] if happenings else inf)
        while happenings and happenings[0][0] <= now:
            _, _, what, subject = heappop(happenings)
            match what:
                case "arrives":
                    is_accepted, after_s = server.call(now)
                    answer = "answered" if is_accepted else "refused"
                    late_s = delay_s * random.random() if delay_s and not is_accepted else 0.0
                    happen(now + round_trip_s / 2 + late_s, answer, (subject, after_s))
                    if is_accepted:
                        happen(now + stream_s, "ends at the server")
                case "answered":
                    limiter.answered(subject[0], now)
                    limiter.succeeded(subject[0], now)
                    happen(now + stream_s, "ends", subject[0])
                case "refused":
                    error = JobError(ErrorCode.RATE_LIMITED, "slow down", 429, retriable=True)
                    if subject[1] is not None:
                        error = msgspec.structs.replace(error, retry_after_ms=round(1000 * subject[1]))
                    assert limiter.failed(subject[0], error, now, random=random.random()) is Verdict.WAIT
                    limiter.leave(subject[0], 0)
                    waiting += 1
                case "ends at the server":
                    server.end(now)
                case "ends":
                    limiter.leave(subject, 10)
                    done += 1
    return Outcome(calls, now)
