"""The control topic: every worker reads all of it, from its beginning, so that late starters know recent cancellations."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from streamworker.errors import KafkaError
from streamworker.kafka.errors import translate_errors
from streamworker.kafka.log import open_log
from streamworker.model import TopicPartition
from streamworker.wire.control import read_control

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from streamworker.config import Settings
    from streamworker.kafka.log import LogReader
    from streamworker.model import ConsumerRecord

__all__ = ["ControlReader"]

_BACKOFF_S = 1.0
_START_TIMEOUT_S = 10.0

log = structlog.get_logger()


class ControlReader:
    """Tells of cancellations: `cancelled(job_id, timestamp in ms, reason)`, each at least once."""

    def __init__(self, settings: Settings, cancelled: Callable[[str, int, str], None]) -> None:
        self._settings = settings
        self._topic = settings.topics.control
        self._cancelled = cancelled
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read what is there, then read on in the background.

        Bounded, and a best effort: neither a topic that takes long nor a record that cannot be read keeps a worker from
        starting. What was missed is heard in the background, and ends its job then.
        """
        try:
            with translate_errors(f"reading {self._topic}"):
                async with asyncio.timeout(_START_TIMEOUT_S):
                    await self._read_present()
        except KafkaError as error:
            log.warning("control.unavailable", reason=str(error))
        self._task = asyncio.create_task(self._read(), name="control")

    async def stop(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _read_present(self) -> None:
        async with self._open() as control:
            async for record in control.snapshot(self._partitions(control)):
                self._take(record)

    async def _read(self) -> None:
        """Read on, for ever. From the beginning each time: to hear of a cancellation twice does no harm."""
        while True:
            try:
                async with self._open() as control:
                    async for record in control.follow(self._partitions(control)):
                        self._take(record)
            except KafkaError as error:
                log.warning("control.unavailable", reason=str(error))
            except Exception:  # whatever a record did to us: who cancels must be heard again
                log.exception("control.crashed")
            await asyncio.sleep(_BACKOFF_S)

    def _open(self) -> AbstractAsyncContextManager[LogReader]:
        return open_log(self._settings.kafka, self._topic, committed_only=False)

    def _partitions(self, control: LogReader) -> list[TopicPartition]:
        return [TopicPartition(self._topic, number) for number in control.partitions]

    def _take(self, record: ConsumerRecord) -> None:
        try:
            cancel = read_control(record.value or b"")
        except ValueError as error:
            log.warning("control.record_ignored", at=str(record.at), reason=str(error))
            return
        self._cancelled(cancel.job_id, record.timestamp, cancel.reason)
