"""Files and batches in memory: the table and a folder, without Kafka and without runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from streamworker.config import BatchSettings
from streamworker.errors import KafkaUnavailable
from streamworker.gateway.batches.records import write_state
from streamworker.gateway.batches.store import FolderStore
from streamworker.gateway.batches.table import Table

if TYPE_CHECKING:
    from pathlib import Path

    from streamworker.gateway.batches.records import StateRecord

__all__ = ["MemoryBatches"]


class MemoryBatches:
    """Has the attributes of `Batches` that the handlers use."""

    def __init__(self, directory: Path, **settings: int) -> None:
        self.settings = BatchSettings(**settings)
        self.table = Table()
        self.store = FolderStore(directory / "files")
        self.folder = directory / "files"
        self.is_ready = True
        self.is_available = True
        self.loses_acknowledgements = False
        self.written: list[str] = []
        """The keys of all writes, failed ones too."""

    async def write(self, id_: str, key: str, record: StateRecord | None) -> None:
        """Apply a record to the table."""
        del id_
        self.written.append(key)
        if not self.is_available:
            raise KafkaUnavailable("no broker")
        self.table.apply(key, None if record is None else write_state(record))
        if self.loses_acknowledgements:
            raise KafkaUnavailable("no acknowledgement")

    def contents(self) -> list[bytes]:
        """Return the contents of all files."""
        return [path.read_bytes() for path in sorted(self.folder.glob("*"))] if self.folder.exists() else []
