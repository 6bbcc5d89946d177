"""What is looked at once per second while a run works: its time, its oldest line, and whether workers are alive."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from streamworker.batch.errors import RunStopped
from streamworker.batch.index import State
from streamworker.batch.open_lines import ANY_OPEN
from streamworker.batch.output import EXPIRED
from streamworker.batch.progress import NO_START, STALL_S
from streamworker.batch.submission import OUTAGE_S, request_at
from streamworker.errors import KafkaError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from streamworker.batch.ledger import Ledger
    from streamworker.batch.open_lines import OpenLines
    from streamworker.batch.ports import BatchInput
    from streamworker.batch.topics import RunTopics

__all__ = ["EXPIRY_GRACE_S", "Expiry", "Watch"]

EXPIRY_GRACE_S = 60.0
"""How long the workers' own endings of expired jobs are awaited."""

_WATCH_S = 1.0
_NO_START_S = 10.0


class Expiry:
    """The end of a run's time (`--expires-in`)."""

    def __init__(
        self,
        expires_ms: int | None,
        ledger: Ledger,
        lines: OpenLines,
        *,
        on_expired: Callable[[], None],
        note: Callable[[str], None],
    ) -> None:
        """`expires_ms` is in ms since the epoch, None for a run without a limit."""
        self._expires_ms = expires_ms
        self._ledger = ledger
        self._lines = lines
        self._on_expired = on_expired
        self._note = note

    async def check(self) -> None:
        """Fail the lines that were not submitted in time, and after a grace those whose jobs have not ended.

        Raises RunStopped, KafkaError.
        """
        now_ms = time.time_ns() // 1_000_000
        if self._expires_ms is None or now_ms < self._expires_ms:
            return
        if not self._ledger.is_expired:
            self._ledger.is_expired = True
            self._on_expired()
            self._note("the run has expired (--expires-in): lines that have not ended are batch_expired")
            await self._lines.fail("batch_expired", EXPIRED, State.PENDING)
        if now_ms >= self._expires_ms + EXPIRY_GRACE_S * 1000 and not self._ledger.is_complete:
            await self._lines.cancel()
            await self._lines.fail("batch_expired", EXPIRED, *ANY_OPEN)


class Watch:
    """Names the oldest line in flight where nothing ends, and stops the run where the brokers do not answer."""

    def __init__(
        self,
        ledger: Ledger,
        source: BatchInput,
        topics: RunTopics,
        *,
        request_timeout_s: float,
        note: Callable[[str], None],
    ) -> None:
        self._ledger = ledger
        self._source = source
        self._topics = topics
        self._timeout_s = request_timeout_s
        self._note = note
        self._written = -1
        self._looked = self._answered = 0.0

    async def run(self, check: Callable[[], Awaitable[None]]) -> None:
        """Watch without end; call `check` each second. Raises RunStopped, and as `check` does."""
        self._begin()
        while True:
            await asyncio.sleep(_WATCH_S)
            await check()
            await self._name_oldest()
            await self._look()

    async def _name_oldest(self) -> None:
        ledger = self._ledger
        if ledger.since_ending() >= STALL_S - _WATCH_S and (oldest := ledger.oldest()) is not None:
            request = await request_at(ledger, self._source, oldest[0])
            ledger.name_oldest(oldest[0], request.custom_id)

    async def _look(self) -> None:
        """Report if no worker has written an event since the last look."""
        if not self._ledger.submitted or self._ledger.since_ending() < _WATCH_S:
            self._begin()
            return
        now = asyncio.get_running_loop().time()
        if now - self._looked < _NO_START_S and self._written >= 0:
            return
        self._looked = now
        try:
            async with asyncio.timeout(self._timeout_s):
                written = await self._topics.events_written()
        except (KafkaError, TimeoutError) as error:
            if asyncio.get_running_loop().time() - self._answered > OUTAGE_S:
                raise RunStopped(f"the brokers do not answer: {error}; run the same command again") from error
            return
        self._answered = asyncio.get_running_loop().time()
        if written == self._written:
            self._note(NO_START)
        self._written = written

    def _begin(self) -> None:
        self._written = -1
        self._looked = self._answered = asyncio.get_running_loop().time()
