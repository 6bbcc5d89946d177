"""`streamworker check`: report what is wrong with configuration, Kafka, topics, upstreams and traces, and what to do."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click
from msgspec.structs import replace

from streamworker.app import open_tracing
from streamworker.cli.one_token import ask_for_one_token
from streamworker.cli.shared import (
    config_option,
    hint,
    quietly,
    run_async,
    settings_of,
    timeout_option,
    waiting,
)
from streamworker.errors import ConfigurationError, KafkaError, UpstreamError
from streamworker.kafka.topics import batch_notes_of, faults_of, open_admin, single_partition_notes_of
from streamworker.model import ErrorCode
from streamworker.upstream.client import HttpUpstream

if TYPE_CHECKING:
    from pathlib import Path

    from streamworker.config import Settings, UpstreamSettings
    from streamworker.model import JobError

__all__ = ["check"]

_ADVICE = {
    ErrorCode.AUTH: "the key is missing or wrong: see api_key_env or api_key_file",
    ErrorCode.QUOTA: "the account of this key has no credit",
    ErrorCode.UPSTREAM_UNAVAILABLE: "is it running, and is base_url right?",
    ErrorCode.TIMEOUT_CONNECT: "is it reachable from this host? is there a proxy or a firewall?",
    ErrorCode.UPSTREAM_PROTOCOL: "base_url must be the URL before /chat/completions, usually with /v1",
}
_NO_MODEL_LIST = {404, 405, 501}


@click.command(short_help="Check configuration, Kafka, topics, upstreams and keys.")
@config_option
@timeout_option
@click.option(
    "--call",
    "model",
    metavar="MODEL",
    help="Also send one real request for one token to every upstream that serves MODEL.",
)
@click.pass_context
def check(context: click.Context, config: Path | None, timeout_s: float, model: str | None) -> int:
    """Check configuration, Kafka, topics, upstreams, keys and traces; report what is wrong and what to do.

    Exits with 0 if nothing is wrong, else with 1.
    """
    settings = settings_of(context, config, needs_keys=True)
    quietly()
    click.echo("ok      configuration")
    return 0 if run_async(_check(settings, timeout_s, model)) else 1


async def _check(settings: Settings, timeout_s: float, model: str | None) -> bool:
    results = [await _check_kafka(settings, timeout_s)]
    for name, upstream in settings.upstreams.items():
        results.append(await _check_upstream(name, upstream))
    if model is not None:
        results.append(await _check_calls(settings, model))
    results.append(await _check_traces(settings))
    return all(results)


async def _check_kafka(settings: Settings, timeout_s: float) -> bool:
    where = settings.kafka.bootstrap_servers
    try:
        async with AsyncExitStack() as stack:
            async with waiting(f"connecting to {where}", timeout_s):
                admin = await stack.enter_async_context(open_admin(settings))
            click.echo(f"ok      broker {where}")
            async with waiting(f"reading ACLs and topics at {where}", timeout_s):
                # A topic that may not be described looks like a missing one, so ACLs are checked first.
                acls = await admin.missing_acls()
                described = {} if acls else await admin.describe()
                topics = faults_of(settings, described)
                notes = batch_notes_of(settings, described) + single_partition_notes_of(settings, described)
                if not acls and (limited := await admin.small_metadata_limit()):
                    notes.append(limited)
    except KafkaError as error:
        click.echo(f"wrong   broker {where}: {error}")
        return False
    for note in notes:
        click.echo(f"note    {note}")
    for what, faults in (("rights", acls), ("topics", topics)):
        for fault in faults:
            click.echo(f"wrong   {fault}")
        if not (acls or topics):
            click.echo(f"ok      {what}")
    return not (acls or topics)


async def _check_upstream(name: str, settings: UpstreamSettings) -> bool:
    what = f"upstream {name} ({settings.base_url})"
    models, error = await _models(settings, what)
    if models is not None:
        click.echo(f"ok      {what}: {len(models)} models")
        return True
    assert error is not None, "there is a list of models or an error"
    if not _has_version(settings.base_url) and error.http_status in _NO_MODEL_LIST:
        with_version = settings.base_url.rstrip("/") + "/v1"
        models, _ = await _models(settings.model_copy(update={"base_url": with_version}), what)
        if models is not None:
            click.echo(f"wrong   {what}: the API is at {with_version}; set base_url to it")
            return False
    if error.http_status in _NO_MODEL_LIST:
        advice = "" if _has_version(settings.base_url) else "; most base URLs end in /v1, is this one right?"
        click.echo(f"ok      {what}: reachable, does not list its models{advice}")
        return True
    click.echo(f"wrong   {what}: {error.code}: {error.message}; {_advice(error)}")
    return False


async def _models(settings: UpstreamSettings, what: str) -> tuple[list[str] | None, JobError | None]:
    """Return the upstream's models, or the error, without secrets."""
    upstream = HttpUpstream(settings)
    try:
        with hint(f"connecting to {what}"):
            return await upstream.models(), None
    except UpstreamError as failure:
        message = upstream.scrub(failure.error.message)
        return None, replace(failure.error, message=message)
    finally:
        await upstream.close()


async def _check_calls(settings: Settings, model: str) -> bool:
    """Send one request to every upstream that serves the model."""
    serving = {
        name: upstream
        for name, upstream in settings.upstreams.items()
        if any(fnmatchcase(model, pattern) for pattern in upstream.models)
    }
    if not serving:
        click.echo(f"wrong   call: no upstream serves {model}; see upstreams.*.models")
    results = [await _check_call(name, upstream, model) for name, upstream in serving.items()]
    return bool(results) and all(results)


async def _check_call(name: str, settings: UpstreamSettings, model: str) -> bool:
    what = f"call of {model} at upstream {name}"
    upstream = HttpUpstream(settings)
    try:
        with hint(what):
            answer = await ask_for_one_token(upstream, settings, model)
    except UpstreamError as failure:
        error = failure.error
        click.echo(f"wrong   {what}: {error.code}: {upstream.scrub(error.message)}; {_advice(error)}")
        return False
    finally:
        await upstream.close()
    usage = "with a usage report" if answer.has_usage else "without a usage report: usage will be estimated"
    click.echo(f"ok      {what}: first delta after {answer.first_delta_ms} ms, {usage}")
    return True


def _advice(error: JobError) -> str:
    return _ADVICE.get(error.code, "see the message")


def _has_version(base_url: str) -> bool:
    return re.search(r"/v\d+", urlsplit(base_url).path) is not None


async def _check_traces(settings: Settings) -> bool:
    try:
        tracing = open_tracing(settings)
    except ConfigurationError as error:
        for fault in error.faults:
            click.echo(f"wrong   {fault}")
        return False
    if tracing is None:
        return True
    with hint("connecting to the trace collector"):
        refusal = await tracing.fault()
    await tracing.close()
    advice = "is the collector running, and is OTEL_EXPORTER_OTLP_ENDPOINT right?"
    click.echo("ok      traces" if refusal is None else f"wrong   traces: {refusal}; {advice}")
    return refusal is None
