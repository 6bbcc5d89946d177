"""What the server itself allows: limits that it enforces, and mishaps that befall a share of calls."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from math import ceil
from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple

from streamworker.practice.script import Fault

if TYPE_CHECKING:
    from streamworker.practice.script import Script

WINDOW_S: Final = 60.0
_STREAMS_RETRY_S: Final = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that is allowed; None is no limit. Requests and tokens are counted over the last 60 seconds.

    A call that is over a limit is answered 429, with `retry-after` and `retry-after-ms`, and counts towards none.
    Tokens are those of the prompt and of the whole answer, taken when the call comes in.
    """

    streams: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mishaps:
    """Shares (0 to 1) of calls that go wrong without having been asked for, drawn from `seed` call by call.

    `limited` calls are answered 429, `stalled` ones fall silent and `broken` ones are reset, each after a number of deltas
    that is drawn as well. What a script wants to go wrong goes first.
    """

    limited: float = 0.0
    stalled: float = 0.0
    broken: float = 0.0
    seed: int = 0
    retry_after_ms: int = 100

    def __post_init__(self) -> None:
        """Refuse shares of more than everything."""
        shares = (self.limited, self.stalled, self.broken)
        if min(shares) < 0 or sum(shares) > 1:
            raise ValueError(f"the shares of mishaps make up {sum(shares):g} of all calls")


class Excess(NamedTuple):
    """A call that is over a limit: which one, and when the next may come."""

    limit: str
    retry_after_s: float

    @property
    def headers(self) -> list[tuple[str, str]]:
        """As OpenAI and Azure send them."""
        return [
            ("retry-after", str(ceil(self.retry_after_s))),
            ("retry-after-ms", f"{self.retry_after_s * 1000:.0f}"),
        ]


class Gate:
    """Lets calls in, or says which limit they are over. `now` is in seconds, of any clock that only goes on."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._came: deque[tuple[float, int]] = deque()
        self._tokens = 0
        self.open = 0
        self.peak = 0

    def enter(self, now: float, tokens: int) -> Excess | None:
        """Let a call in, which has to `leave` again; or say what it is over."""
        self._forget(now - WINDOW_S)
        excess = self._excess(now, tokens)
        if excess is None:
            self._came.append((now, tokens))
            self._tokens += tokens
            self.open += 1
            self.peak = max(self.peak, self.open)
        return excess

    def leave(self) -> None:
        """A call that was let in has ended."""
        self.open -= 1

    def _excess(self, now: float, tokens: int) -> Excess | None:
        limits = self._limits
        if limits.streams is not None and self.open >= limits.streams:
            return Excess("streams", _STREAMS_RETRY_S)
        if limits.requests_per_minute is not None and len(self._came) >= limits.requests_per_minute:
            return Excess("requests_per_minute", self._until(now, calls=1))
        if limits.tokens_per_minute is not None and self._tokens + tokens > limits.tokens_per_minute:
            over = self._tokens + tokens - limits.tokens_per_minute
            return Excess("tokens_per_minute", self._until(now, tokens=over))
        return None

    def _until(self, now: float, calls: int = 0, tokens: int = 0) -> float:
        """Seconds until so many calls or tokens have left the window."""
        for came, cost in self._came:
            calls -= 1
            tokens -= cost
            if calls <= 0 and tokens <= 0:
                return came + WINDOW_S - now
        return WINDOW_S

    def _forget(self, before: float) -> None:
        while self._came and self._came[0][0] <= before:
            self._tokens -= self._came.popleft()[1]


class Luck:
    """Draws what befalls each call."""

    def __init__(self, mishaps: Mishaps) -> None:
        self._mishaps = mishaps
        self._random = Random(mishaps.seed)  # noqa: S311 - the same seed has to give the same mishaps

    def befall(self, script: Script, deltas: int) -> tuple[Script, str | None]:
        """The script as it will be played, and the mishap in it. `deltas` are all that it has."""
        drawn, after = self._random.random(), self._random.randint(0, deltas)
        if script != script.well():
            return script, None
        mishaps = self._mishaps
        for name, share in (
            ("limited", mishaps.limited),
            ("stalled", mishaps.stalled),
            ("broken", mishaps.broken),
        ):
            if drawn < share:
                return self._with(script, name, after), name
            drawn -= share
        return script, None

    def _with(self, script: Script, mishap: str, after: int) -> Script:
        if mishap == "limited":
            return replace(script, status=429, retry_after_ms=str(self._mishaps.retry_after_ms))
        return replace(script, fault=Fault.STALL if mishap == "stalled" else Fault.BREAK, after=after)
