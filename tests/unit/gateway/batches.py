"""Files and batches in memory: one gateway's table and folder, and the state topic that several gateways share."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from streamworker.config import BatchSettings
from streamworker.errors import KafkaUnavailable
from streamworker.gateway.batches.records import BatchRecord, read_state, write_state
from streamworker.gateway.batches.store import FolderStore
from streamworker.gateway.batches.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from streamworker.gateway.batches.records import StateRecord

__all__ = ["BATCH", "MemoryBatches", "StateInMemory", "StateLog", "a_batch"]

BATCH = "batch_1"


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


def a_batch(batch_id: str = BATCH, **members: Any) -> BatchRecord:
    """Return a batch of the file `file-1`."""
    defaults: dict[str, Any] = {
        "tenant": "acme", "input_file_id": "file-1", "completion_window": "24h", "created_at": 1, "expires_at": 2**33,
    }  # fmt: skip
    return BatchRecord(id=batch_id, **defaults | members)


class StateLog:
    """The state topic of all owners: each record is in the table of every owner when `write` returns."""

    def __init__(self) -> None:
        self.records: list[tuple[str, bytes | None]] = []
        self.readers: list[StateInMemory] = []
        self.faults: list[Exception] = []

    def append(self, key: str, record: StateRecord | None) -> None:
        value = None if record is None else write_state(record)
        self.records.append((key, value))
        for reader in self.readers:
            reader.unread.append((key, value))
            if not reader.is_slow:
                reader.read()

    def compacted(self) -> Table:
        """Return the table of a gateway that starts when only the last record of each key is left."""
        table = Table()
        for key, value in dict(self.records).items():
            table.apply(key, value)
        return table

    def statuses(self, batch_id: str = BATCH) -> list[str]:
        """Return the statuses that a batch has had, in order, each once."""
        found = [
            read.status
            for key, value in self.records
            if key == batch_id and value is not None and isinstance(read := read_state(value), BatchRecord)
        ]
        return list(dict.fromkeys(found))


class StateInMemory:
    """Takes the place of `StateTopic`. Ids that end in an odd digit are in partition 1, the others in 0."""

    topic = "batches"

    def __init__(self, log: StateLog) -> None:
        self.log = log
        self.table = Table()
        self.is_ready = True
        self.changed: Callable[[str], None] = lambda _: None
        self.unread: list[tuple[str, bytes | None]] = []
        self.is_slow = False
        """Whether records are read only when this process writes one itself."""
        log.readers.append(self)

    def read(self) -> None:
        """Take over what was not read yet."""
        while self.unread:
            if (id_ := self.table.apply(*self.unread.pop(0))) is not None:
                self.changed(id_)

    def partition(self, id_: str) -> int:
        return int(id_[-1], 16) % 2

    async def write(self, id_: str, key: str, record: StateRecord | None) -> None:
        assert key.startswith(id_)
        await asyncio.sleep(0)
        if self.log.faults:
            raise self.log.faults.pop(0)
        self.log.append(key, record)
        self.read()
