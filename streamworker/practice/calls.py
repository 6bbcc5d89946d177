"""A bounded log of chat-completions calls: each request, and what was sent as its answer."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.practice.moves import Move

Outcome = Literal["completed", "client_closed", "fault", "refused", "limited", "died", "stopped"]
"""How a call ended.

`fault`: a fault of the script or a mishap; `refused`: a 4xx that the script did not ask for; `limited`: one of the server's
limits was exceeded; `died`: the server simulated a crash; `stopped`: `stop()` was called.
"""


@dataclass(slots=True)
class Sent:
    """The content of an event stream so far, counted as a reader counts it.

    `deltas` are choice deltas, including those that carry only a role or a finish reason. `bytes` are those of the body
    before compression and framing. `usage` is the last report.
    """

    deltas: int = 0
    chunks: int = 0
    content_chars: int = 0
    reasoning_chars: int = 0
    bytes: int = 0
    usage: dict[str, Any] | None = None


@dataclass(slots=True, kw_only=True)
class Call:
    """One POST to /v1/chat/completions. Times are in seconds of the event loop's clock; None means "not yet".

    `number` counts the upstream's calls from 1. `headers` has names in lower case; its `authorization` is "present",
    "matched" or "wrong", never the secret. `body` is the parsed JSON, or None. `deltas_sent` excludes the deltas that carry
    only a role or a finish reason. `exceeded` names the limit that the call exceeded; `mishap` names its random fault.
    """

    path: str
    headers: dict[str, str]
    started_at: float
    content_limit: int
    number: int = 0
    model: str | None = None
    body: Any = None
    status: int | None = None
    first_byte_at: float | None = None
    ended_at: float | None = None
    outcome: Outcome | None = None
    exceeded: str | None = None
    mishap: str | None = None
    deltas_sent: int = 0
    sent: Sent = field(default_factory=Sent)
    _content: dict[int, list[str]] = field(default_factory=dict)

    @property
    def usage_sent(self) -> dict[str, Any] | None:
        """The last usage report."""
        return self.sent.usage

    @property
    def content_sent(self) -> list[str]:
        """The content sent so far, per choice as in `expected_text`; in total at most `content_limit` characters."""
        return [
            "".join(self._content.get(choice, ())) for choice in range(max(self._content, default=-1) + 1)
        ]

    def note(self, move: Move) -> None:
        """Count a write that was completed."""
        sent = self.sent
        sent.deltas += move.deltas
        sent.chunks += move.chunks
        if move.usage is not None:
            sent.usage = move.usage
        for piece in move.pieces:
            self.deltas_sent += 1
            sent.content_chars += len(piece.content)
            sent.reasoning_chars += len(piece.reasoning)
            if piece.content and self.content_limit > 0:
                self._content.setdefault(piece.choice, []).append(piece.content[: self.content_limit])
                self.content_limit -= len(piece.content)

    def summary(self) -> dict[str, Any]:
        """Return the record without its content, as JSON values."""
        names = (
            "model",
            "status",
            "started_at",
            "first_byte_at",
            "ended_at",
            "outcome",
            "exceeded",
            "mishap",
            "deltas_sent",
            "usage_sent",
        )
        return {name: getattr(self, name) for name in names} | {"sent": asdict(self.sent)}


class CallLog:
    """The latest `maxlen` calls, and the counts of all calls."""

    def __init__(self, maxlen: int) -> None:
        self.latest: deque[Call] = deque(maxlen=maxlen)
        self.outcomes: Counter[str] = Counter()
        self.exceeded: Counter[str] = Counter()
        self.total = 0
        self.open = 0
        self.max_open = 0
        self._waits: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    def start(self, call: Call) -> None:
        """Add a call that starts."""
        self.latest.append(call)
        self.total += 1
        call.number = self.total
        self.open += 1
        self.max_open = max(self.max_open, self.open)
        self._wake()

    def end(self, call: Call, outcome: Outcome, now: float) -> None:
        """Complete the record of a call."""
        call.outcome, call.ended_at = outcome, now
        self.outcomes[outcome] += 1
        if call.exceeded is not None:
            self.exceeded[call.exceeded] += 1
        self.open -= 1
        self._wake()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition, which is evaluated whenever a call starts or ends."""
        if not condition():
            waiter = asyncio.get_running_loop().create_future()
            self._waits.append((condition, waiter))
            await waiter

    def _wake(self) -> None:
        for condition, waiter in self._waits:
            if not waiter.done() and condition():
                waiter.set_result(None)
        self._waits = [wait for wait in self._waits if not wait[1].done()]

    def summary(self, limit: int) -> dict[str, Any]:
        """Return the counts and the latest `limit` calls, newest last."""
        recent = list(self.latest)[-limit:] if limit else []
        counts = {"total": self.total, "open_streams": self.open, "max_open": self.max_open}
        counters = {"outcomes": dict(self.outcomes), "exceeded": dict(self.exceeded)}
        return counts | counters | {"calls": [call.summary() for call in recent]}
