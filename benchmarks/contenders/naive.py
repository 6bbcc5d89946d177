"""The usual implementation: the openai SDK, and `AIOKafkaProducer.send` for each chunk."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from benchmarks.contenders import place


async def answer(client: openai.AsyncOpenAI, producer: Any, job: dict[str, Any]) -> None:
    """Publish one streamed completion to the events topic."""
    job_id, seq, usage = job["job_id"], 0, None
    stream = await client.chat.completions.create(
        **job["request"], stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        if chunk.usage is not None:
            usage = chunk.usage.model_dump()
        for choice in chunk.choices:
            delta = choice.delta.model_dump(exclude_unset=True)
            event = place.delta_event(job_id, "1", seq, choice.index, delta, choice.finish_reason)
            await producer.send(
                place.EVENTS, json.dumps(event).encode(), key=job_id.encode(), headers=place.DELTA_HEADERS
            )
            seq += 1
    await producer.send_and_wait(
        place.EVENTS,
        json.dumps(place.usage_event(job_id, "1", seq, usage)).encode(),
        key=job_id.encode(),
        headers=place.USAGE_HEADERS,
    )


async def main() -> None:
    """Run jobs until killed."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    http = openai.DefaultAsyncHttpxClient(limits=limits)
    client = openai.AsyncOpenAI(base_url=place.BASE_URL, api_key="bench", http_client=http)
    producer = AIOKafkaProducer(bootstrap_servers=place.BOOTSTRAP, **place.PRODUCER)
    consumer = AIOKafkaConsumer(
        place.JOBS, bootstrap_servers=place.BOOTSTRAP, group_id=place.JOBS, auto_offset_reset="earliest"
    )
    await producer.start()
    await consumer.start()
    tasks = set()
    async for record in consumer:
        task = asyncio.create_task(answer(client, producer, json.loads(record.value)))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


if __name__ == "__main__":
    uvloop.run(main())
