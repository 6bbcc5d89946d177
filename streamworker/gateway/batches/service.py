"""The batches of one gateway process: state, files, and the runs that it owns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.gateway.batches.records import STATUSES
from streamworker.gateway.batches.runner import Runner
from streamworker.gateway.batches.store import open_store
from streamworker.gateway.batches.topic import StateTopic
from streamworker.telemetry import gateway_metrics as table

if TYPE_CHECKING:
    from streamworker.config import BatchSettings, Settings
    from streamworker.gateway.batches.records import StateRecord
    from streamworker.gateway.batches.store import FileStore
    from streamworker.gateway.batches.table import Table
    from streamworker.telemetry.metrics import Metrics

__all__ = ["Batches"]


class Batches:
    """Starts and stops the parts together."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Raises ConfigurationError for a store that cannot be used."""
        self.settings: BatchSettings = settings.batch
        self.store: FileStore = open_store(settings.batch.files)
        self._topic = StateTopic(settings.kafka, settings.topics.batches, self._changed)
        self._runner = Runner(settings, self._topic, self.store, metrics)
        self._metrics = metrics
        metrics.track(table.BATCHES_RUNNING, lambda: self.running)
        metrics.before_scrape(self._count_statuses)

    @property
    def is_ready(self) -> bool:
        """Whether the state was read to its end."""
        return self._topic.is_ready

    @property
    def running(self) -> int:
        """Number of batches that this process runs now."""
        return self._runner.running

    @property
    def table(self) -> Table:
        """Files and batches."""
        return self._topic.table

    async def start(self) -> None:
        """Read the state, and join the owners. Raises KafkaError."""
        await self._topic.start()
        await self._runner.start()

    async def stop(self) -> None:
        """Leave the runs to another gateway. Bounded in time; never raises."""
        await self._runner.stop()
        await self._topic.stop()

    async def write(self, id_: str, key: str, record: StateRecord | None) -> None:
        """Write a record and read it back; see `StateTopic.write`."""
        await self._topic.write(id_, key, record)

    def _count_statuses(self) -> None:
        counts = self.table.statuses()
        for status in STATUSES:
            self._metrics.set(table.BATCHES, counts[status], status)

    def _changed(self, id_: str) -> None:
        self._runner.changed(id_)
