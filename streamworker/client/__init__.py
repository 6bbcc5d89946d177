"""The client library: submit jobs, read their events and results, cancel them.

::

    async with Client.from_settings() as client:
        job = await client.submit(model="m", messages=[{"role": "user", "content": "Hi"}])
        async for event in job.events():
            ...

    with connect() as client:  # blocking
        print(client.complete(model="m", messages=[{"role": "user", "content": "Hi"}]).text)

docs/python.md describes it, and states what is stable.
"""

from streamworker.client.blocking import BlockingClient, BlockingJob, connect
from streamworker.client.client import Client
from streamworker.client.errors import InvalidJob, JobFailed, Lagged, SubmitUnknown
from streamworker.client.events import Delta, Ended, Event, Restarted, Started
from streamworker.client.job import EventStream, Job
from streamworker.client.result import Result

__all__ = [
    "BlockingClient",
    "BlockingJob",
    "Client",
    "Delta",
    "Ended",
    "Event",
    "EventStream",
    "InvalidJob",
    "Job",
    "JobFailed",
    "Lagged",
    "Restarted",
    "Result",
    "Started",
    "SubmitUnknown",
    "connect",
]
