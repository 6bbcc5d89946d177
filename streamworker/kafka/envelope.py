"""What surrounds the values of one job's records: receipt, key and headers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from streamworker.kafka.record_batch import encode_headers, encode_key

if TYPE_CHECKING:
    from streamworker.errors import RecordTooLarge
    from streamworker.model import Headers

__all__ = ["Entry", "Envelope", "SinkReceipt"]


class SinkReceipt:
    """Counts the records of one job that are not acknowledged yet."""

    __slots__ = ("_waiter", "error", "is_new", "offset", "pending")

    def __init__(self) -> None:
        self.pending = 0
        self.is_new = True
        """Whether no record was published yet. A job's first record does not wait for the linger."""
        self.error: RecordTooLarge | None = None
        self.offset: int | None = None
        """The offset of the record that was acknowledged last, if the sink keeps offsets."""
        self._waiter: asyncio.Future[None] | None = None

    async def settled(self) -> None:
        """Wait until every record is acknowledged. Raises RecordTooLarge if the broker refused one."""
        if self.pending:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.error is not None:
            raise self.error

    def settle(self) -> None:
        """Wake the waiter: no record is pending."""
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Envelope:
    """The receipt, the key and the headers of records, encoded as a batch has them."""

    __slots__ = ("encoded_headers", "encoded_key", "receipt", "size")

    def __init__(self, receipt: SinkReceipt, key: bytes | None, headers: Headers) -> None:
        self.receipt = receipt
        self.encoded_key = encode_key(key)
        self.encoded_headers = encode_headers(headers)
        self.size = len(key or b"") + sum(len(name) + len(value or b"") for name, value in headers)
        """Size of key and headers in bytes, without Kafka's framing."""


Entry = tuple[Envelope, bytes | None, int]
"""A record: its envelope, its value, and its size in bytes. A plain tuple: a NamedTuple takes three times as long to create."""
