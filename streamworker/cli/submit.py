"""`streamworker submit`."""

from __future__ import annotations

import asyncio
import sys
from codecs import BOM_UTF8
from functools import partial
from typing import IO, TYPE_CHECKING, Any

import click

from streamworker.cli.shared import config_option, quietly, run_async, settings_of, timeout_option, waiting
from streamworker.client import Client, InvalidJob
from streamworker.client.ids import new_job_id
from streamworker.client.requests import check_job
from streamworker.wire.json import InvalidJSON, decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from streamworker.config import TopicSettings

__all__ = ["submit"]

_AT_ONCE = 1000
"""Jobs that are sent before the first of them is acknowledged."""

_SHOWN_FAULTS = 10


@click.command()
@config_option
@timeout_option
@click.argument("prompt", nargs=-1)
@click.option("-m", "--model", help="Model for the prompt; required with a prompt.")
@click.option(
    "-f",
    "--file",
    type=click.File("rb"),
    help="Read jobs from a file with one JSON object, or one per line. - is standard input.",
)
@click.option("--job-id", help="Job id; default: a new one.")
@click.option("--upstream", help="Name of a configured upstream.")
@click.option("--deadline", help="RFC 3339 time.")
@click.option(
    "--on-break", type=click.Choice(["fail", "restart"]), help="What the job does if its stream breaks."
)
@click.option("--reply-to", help="Topic for the events; one of topics.allowed_reply_to.")
@click.option(
    "--metadata",
    "-d",
    multiple=True,
    metavar="KEY=VALUE",
    help="Copied into the job's events; may be repeated.",
)
@click.option("--key", help="Record key, such as a conversation id; default: the job's id.")
@click.option("--topic", help="Job topic; default: the first of topics.jobs.")
@click.pass_context
def submit(
    context: click.Context,
    /,
    config: Path | None,
    timeout_s: float,
    topic: str | None,
    key: str | None,
    **given: Any,
) -> None:
    """Submit jobs and print their ids, one per line.

    \b
    streamworker submit -m gpt-4o-mini "Why is the sky blue?"
    streamworker submit -f jobs.jsonl
    echo '{"request": {...}}' | streamworker submit
    """
    settings = settings_of(context, config)
    quietly()
    jobs = list(_jobs(**given))
    _check_topics(settings.topics, topic, jobs)
    jobs_topic = topic or settings.topics.jobs[0]

    async def work() -> None:
        action = f"writing to {jobs_topic} at {settings.kafka.bootstrap_servers}"
        async with waiting(action, timeout_s), Client(settings, is_lazy=True) as client:
            for some in _chunks(jobs):
                await asyncio.gather(*(client.submit_job(job, key=key, topic=topic) for job in some))

    run_async(work())
    for job in jobs:
        click.echo(job["job_id"])


def _chunks(jobs: Sequence[dict[str, Any]]) -> Iterable[Sequence[dict[str, Any]]]:
    return (jobs[start : start + _AT_ONCE] for start in range(0, len(jobs), _AT_ONCE))


def _check_topics(topics: TopicSettings, topic: str | None, jobs: Sequence[dict[str, Any]]) -> None:
    """Refuse topics that no worker with these settings reads from, or writes to. Raises UsageError."""
    if topic is not None and topic not in topics.jobs:
        raise click.UsageError(f"--topic {topic} is not one of topics.jobs: {', '.join(topics.jobs)}")
    for job in jobs:
        if (to := job.get("reply_to")) is not None and to not in topics.allowed_reply_to:
            allowed = ", ".join(topics.allowed_reply_to) or "it is empty"
            raise click.UsageError(f"reply_to {to} is not one of topics.allowed_reply_to: {allowed}")


def _jobs(
    *, prompt: Sequence[str], file: IO[bytes] | None, model: str | None, **given: Any
) -> Iterable[dict[str, Any]]:
    if prompt:
        if file is not None:
            raise click.UsageError("a prompt and --file cannot be combined")
        if not model:
            raise click.UsageError("a prompt needs --model")
        messages = [{"role": "user", "content": " ".join(prompt)}]
        yield _checked(_completed({"request": {"model": model, "messages": messages}}, **given), "the job")
        return
    if model:
        raise click.UsageError("--model needs a prompt; jobs of a file have their model in request.model")
    source = file or sys.stdin.buffer
    if source is sys.stdin.buffer and sys.stdin.isatty():
        raise click.UsageError("a prompt, --file, or jobs on standard input are required")
    objects = _read(source.read().removeprefix(BOM_UTF8))
    if not objects:
        raise click.UsageError("the input has no job")
    if given["job_id"] and len(objects) > 1:
        raise click.UsageError("--job-id needs an input with a single job")
    yield from _all_of(
        partial(_checked, _completed(job, **given), f"job {number}") for number, job in enumerate(objects, 1)
    )


def _read(data: bytes) -> Sequence[dict[str, Any]]:
    """Return the jobs of an input with one JSON object, or one per line. Raises UsageError."""
    try:
        whole = decode(data)
    except InvalidJSON:
        lines = ((number, line) for number, line in enumerate(data.splitlines(), 1) if line.strip())
        return _all_of(partial(_read_line, line, f"line {number}") for number, line in lines)
    return [_object(whole, "the input")]


def _read_line(line: bytes, where: str) -> dict[str, Any]:
    try:
        return _object(decode(line), where)
    except InvalidJSON as error:
        raise click.UsageError(f"{where} is not JSON: {error}") from None


def _all_of(reads: Iterable[Callable[[], dict[str, Any]]]) -> Sequence[dict[str, Any]]:
    """Return all results. Raises one UsageError with the first faults, so that they can be corrected at once."""
    jobs, faults = [], []
    for read in reads:
        try:
            jobs.append(read())
        except click.UsageError as error:
            faults.append(error.message)
    if faults:
        more = f"\nand {len(faults) - _SHOWN_FAULTS} more" if len(faults) > _SHOWN_FAULTS else ""
        raise click.UsageError("\n".join(faults[:_SHOWN_FAULTS]) + more)
    return jobs


def _object(job: Any, where: str) -> dict[str, Any]:
    if not isinstance(job, dict):
        raise click.UsageError(f"{where} is not a JSON object")
    return job


def _completed(
    job: dict[str, Any],
    *,
    job_id: str | None,
    upstream: str | None,
    deadline: str | None,
    reply_to: str | None,
    on_break: str | None,
    metadata: Sequence[str],
) -> dict[str, Any]:
    """Return the job with the values of the options, and with a new id if it has none."""
    options = {"upstream": upstream, "deadline": deadline, "reply_to": reply_to, "on_break": on_break}
    completed = {**job, **{name: value for name, value in options.items() if value is not None}}
    completed["job_id"] = job_id or job.get("job_id") or new_job_id()
    given = job.get("metadata") or {}
    if metadata and isinstance(given, dict):  # another type is refused by `_checked`
        completed["metadata"] = {**given, **dict(_pair(text) for text in metadata)}
    return completed


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--metadata takes KEY=VALUE, not {text!r}")
    return name, value


def _checked(job: dict[str, Any], what: str) -> dict[str, Any]:
    """Return a valid job. Raises UsageError with the faults that a worker would report."""
    try:
        check_job(job)
    except InvalidJob as error:
        faults = "\n".join(f"  {fault}" for fault in error.faults)
        raise click.UsageError(f"{what} is not valid:\n{faults}") from None
    return job
