"""A FastStream application as in its documentation: a subscriber with workers, a publisher, pydantic models."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import uvloop
from faststream import FastStream
from faststream.kafka import KafkaBroker
from pydantic import BaseModel

from benchmarks.contenders import place

MAX_WORKERS = 2048

broker = KafkaBroker(place.BOOTSTRAP, logger=None, **place.PRODUCER)
app = FastStream(broker, logger=None)
publisher = broker.publisher(place.EVENTS)
limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)


class Job(BaseModel):
    """The value of a job record."""

    job_id: str
    request: dict[str, Any]


@app.after_startup
async def open_client() -> None:
    """Create the client in the running loop."""
    http = openai.DefaultAsyncHttpxClient(limits=limits)
    app.context.set_global(
        "client", openai.AsyncOpenAI(base_url=place.BASE_URL, api_key="bench", http_client=http)
    )


@broker.subscriber(place.JOBS, group_id=place.JOBS, auto_offset_reset="earliest", max_workers=MAX_WORKERS)
async def answer(job: Job) -> None:
    """Publish one streamed completion to the events topic."""
    client: openai.AsyncOpenAI = app.context.get("client")
    key, seq, usage = job.job_id.encode(), 0, None
    stream = await client.chat.completions.create(
        **job.request, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        if chunk.usage is not None:
            usage = chunk.usage.model_dump()
        for choice in chunk.choices:
            delta = choice.delta.model_dump(exclude_unset=True)
            event = place.delta_event(job.job_id, "1", seq, choice.index, delta, choice.finish_reason)
            await publisher.publish(event, key=key)
            seq += 1
    await publisher.publish(place.usage_event(job.job_id, "1", seq, usage), key=key)


if __name__ == "__main__":
    uvloop.run(app.run())
