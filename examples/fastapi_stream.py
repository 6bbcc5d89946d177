"""Stream an answer to a browser as server-sent events: `uvicorn fastapi_stream:app`, then /ask?prompt=Hi."""

from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from streamworker import Client

client = Client.from_settings()  # reads STREAMWORKER_CONFIG, or STREAMWORKER_KAFKA__BOOTSTRAP_SERVERS


@asynccontextmanager
async def lifespan(_app):
    async with client:
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/ask")
async def ask(prompt: str, model: str = "apertus-70b-instruct"):
    job = await client.submit(model=model, messages=[{"role": "user", "content": prompt}])

    async def events():
        async with job.cancelled_on_exit():  # a browser that leaves ends the upstream call
            async for event in job.events():
                yield f"data: {event.json()}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")
