"""The limit: the minimal cost of the same work.

An `asyncio.Protocol` per stream splits the received bytes into events, orjson decodes chunks and encodes events, and one
batch builder per events partition collects them; all batches are sent when the previous ones are acknowledged and the
linger is over. Producer, linger, compression, key, headers and shape of events are those of streamworker. There are no
timeouts, retries, checks, resends, `started` events and transactions; offsets are committed automatically.
"""

from __future__ import annotations

import asyncio
import os
from functools import partial
from typing import Any, cast
from urllib.parse import urlsplit

import orjson
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.partitioner import murmur2

from benchmarks.contenders import place

BATCH_BYTES = 512 << 10
LINGER_S = float(os.environ.get("STREAMWORKER_EVENTS__LINGER_MS", "5")) / 1000


class Sink:
    """One open batch per events partition; all batches with records are sent together."""

    def __init__(self, producer: Any, partitions: int) -> None:
        self._producer = producer
        self._filled = asyncio.Event()
        self._batches = [producer.create_batch() for _ in range(partitions)]
        self._task = asyncio.create_task(self._run())

    def append(self, partition: int, key: bytes, event: dict[str, Any], headers: list[Any]) -> None:
        """Append an event to the open batch."""
        value = orjson.dumps(event)
        fits = self._batches[partition].append(timestamp=None, key=key, value=value, headers=headers)
        if fits is None:
            raise SystemExit("the broker is too slow for the limit to be measured")
        self._filled.set()

    async def _run(self) -> None:
        while True:
            await self._filled.wait()
            self._filled.clear()
            acknowledged = []
            for partition, batch in enumerate(self._batches):
                if batch.record_count():
                    self._batches[partition] = self._producer.create_batch()
                    acknowledged.append(
                        await self._producer.send_batch(batch, place.EVENTS, partition=partition)
                    )
            await asyncio.gather(*acknowledged, asyncio.sleep(LINGER_S))


class Stream(asyncio.Protocol):
    """The stream of one job."""

    def __init__(self, job: dict[str, Any], sink: Sink, partition: int, host: str, path: str) -> None:
        self._job_id = job["job_id"]
        self._key = job["job_id"].encode()
        self._sink = sink
        self._partition = partition
        request = {**job["request"], "stream": True, "stream_options": {"include_usage": True}}
        body = orjson.dumps(request)
        self._request = (
            f"POST {path}/chat/completions HTTP/1.1\r\nhost: {host}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        ).encode() + body
        self._seq = 0
        self._rest = b""
        self._usage = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        """Publish the complete deltas of the received bytes."""
        data = self._rest + data
        read = 0
        while (begin := data.find(b"data: ", read)) >= 0 and (end := data.find(b"\n\n", begin)) >= 0:
            self._event(data[begin + 6 : end])
            read = end + 2
        self._rest = data[read:]

    def _event(self, data: bytes) -> None:
        if data == b"[DONE]":
            event = place.usage_event(self._job_id, "1", self._seq, self._usage)
            self._sink.append(self._partition, self._key, event, place.USAGE_HEADERS)
            self._transport.close()
            return
        chunk = orjson.loads(data)
        for choice in chunk["choices"]:
            event = place.delta_event(
                self._job_id, "1", self._seq, choice["index"], choice["delta"], choice["finish_reason"]
            )
            if not self._seq:
                event["chunk"] = {name: chunk[name] for name in ("id", "created", "model")}
            self._sink.append(self._partition, self._key, event, place.DELTA_HEADERS)
            self._seq += 1
        self._usage = chunk.get("usage")


async def main() -> None:
    """Run jobs until killed."""
    producer = AIOKafkaProducer(
        bootstrap_servers=place.BOOTSTRAP,
        max_batch_size=BATCH_BYTES,
        max_request_size=1 << 30,
        **place.PRODUCER,
    )
    consumer = AIOKafkaConsumer(
        place.JOBS, bootstrap_servers=place.BOOTSTRAP, group_id=place.JOBS, auto_offset_reset="earliest"
    )
    await producer.start()
    await consumer.start()
    count = len(await producer.partitions_for(place.EVENTS))
    sink = Sink(producer, count)
    url = urlsplit(place.BASE_URL)
    loop = asyncio.get_running_loop()
    async for record in consumer:
        job = orjson.loads(record.value)
        partition = (murmur2(job["job_id"].encode()) & 0x7FFFFFFF) % count
        stream = partial(Stream, job, sink, partition, url.netloc, url.path)
        await loop.create_connection(stream, url.hostname or "", url.port or 80)


if __name__ == "__main__":
    uvloop.run(main())
