"""Read cancellations from the control topic.

Every worker reads the whole topic from its beginning, so that a worker that starts later knows recent cancellations.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from streamworker.errors import KafkaError
from streamworker.kafka.acls import RequiredAcls
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
    """Calls `cancelled(job_id, timestamp in ms, reason)` at least once for each cancellation."""

    def __init__(self, settings: Settings, cancelled: Callable[[str, int, str], None]) -> None:
        self._settings = settings
        self._topic = settings.topics.control
        self._cancelled = cancelled
        self._acls = RequiredAcls.of_worker(settings)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Read the cancellations that the topic holds now, then go on reading in a background task.

        The first reading is bounded in time, and its failure is logged only: neither a long topic nor an unreadable
        record keeps a worker from starting. The background task reads from the beginning again.
        """
        try:
            with translate_errors(f"reading {self._topic}", self._acls):
                async with asyncio.timeout(_START_TIMEOUT_S):
                    await self._read_present()
        except KafkaError as error:
            log.warning("control.unavailable", reason=str(error))
        self._task = asyncio.create_task(self._read_forever(), name="control")

    async def stop(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _read_present(self) -> None:
        async with self._open() as control:
            async for record in control.snapshot(self._partitions(control)):
                self._handle(record)

    async def _read_forever(self) -> None:
        """Read and follow the topic; start again from its beginning after an error. Repeated cancellations do no harm."""
        while True:
            try:
                async with self._open() as control:
                    async for record in control.follow(self._partitions(control)):
                        self._handle(record)
            except KafkaError as error:
                log.warning("control.unavailable", reason=str(error))
            except Exception:  # later cancellations must be read whatever one record caused
                log.exception("control.crashed")
            await asyncio.sleep(_BACKOFF_S)

    def _open(self) -> AbstractAsyncContextManager[LogReader]:
        return open_log(self._settings.kafka, self._topic, committed_only=False, acls=self._acls)

    def _partitions(self, control: LogReader) -> list[TopicPartition]:
        return [TopicPartition(self._topic, number) for number in control.partitions]

    def _handle(self, record: ConsumerRecord) -> None:
        try:
            cancel = read_control(record.value or b"")
        except ValueError as error:
            log.warning("control.record_ignored", at=str(record.at), reason=str(error))
            return
        self._cancelled(cancel.job_id, record.timestamp, cancel.reason)
