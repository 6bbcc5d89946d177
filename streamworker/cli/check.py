"""`streamworker check`: which of configuration, broker, topics, upstreams, keys and traces is wrong, and what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from streamworker.app import open_tracing
from streamworker.cli.shared import config_option, quietly, run_async, settings_of
from streamworker.errors import ConfigurationError, KafkaError, UpstreamError
from streamworker.kafka.topics import faults_of, open_admin
from streamworker.model import ErrorCode
from streamworker.upstream.client import HttpUpstream

if TYPE_CHECKING:
    from pathlib import Path

    from streamworker.config import Settings, UpstreamSettings

__all__ = ["check"]

_ADVICE = {
    ErrorCode.AUTH: "the key is missing or wrong: look at api_key_env or api_key_file",
    ErrorCode.UPSTREAM_UNAVAILABLE: "is it running, and is base_url right?",
    ErrorCode.TIMEOUT_CONNECT: "is it reachable from here? a proxy or firewall in between?",
    ErrorCode.UPSTREAM_PROTOCOL: "base_url has to end where /chat/completions is appended, usually with /v1",
}


@click.command()
@config_option
@click.pass_context
def check(context: click.Context, config: Path | None) -> int:
    """Check configuration, broker, topics, upstreams, keys and traces; say what is wrong and what to do."""
    settings = settings_of(context, config, needs_keys=True)
    quietly()
    click.echo("ok      configuration")
    return 0 if run_async(_check(settings)) else 1


async def _check(settings: Settings) -> bool:
    results = [await _check_kafka(settings)]
    for name, upstream in settings.upstreams.items():
        results.append(await _check_upstream(name, upstream))
    results.append(await _check_traces(settings))
    return all(results)


async def _check_kafka(settings: Settings) -> bool:
    where = settings.kafka.bootstrap_servers
    try:
        async with open_admin(settings) as admin:
            click.echo(f"ok      broker {where}")
            # Who may not see a topic is told that there is none: rights come first.
            acls = await admin.missing_acls()
            topics = [] if acls else faults_of(settings, await admin.describe())
    except KafkaError as error:
        click.echo(f"wrong   broker {where}: {error}")
        return False
    for what, faults in (("rights", acls), ("topics", topics)):
        for fault in faults:
            click.echo(f"wrong   {fault}")
        if not (acls or topics):
            click.echo(f"ok      {what}")
    return not (acls or topics)


async def _check_upstream(name: str, settings: UpstreamSettings) -> bool:
    upstream = HttpUpstream(settings)
    what = f"upstream {name} ({settings.base_url})"
    try:
        models = await upstream.models()
    except UpstreamError as failure:
        error = failure.error
        if error.http_status in {404, 405, 501}:  # it answers; not every one lists its models
            click.echo(
                f"ok      {what}: reachable, does not list models (if base_url ends in /v1, that is fine)"
            )
            return True
        advice = _ADVICE.get(error.code, "see the message")
        click.echo(f"wrong   {what}: {error.code}: {upstream.scrub(error.message)}; {advice}")
        return False
    finally:
        await upstream.close()
    click.echo(f"ok      {what}: {len(models)} models")
    return True


async def _check_traces(settings: Settings) -> bool:
    try:
        tracing = open_tracing(settings)
    except ConfigurationError as error:
        for fault in error.faults:
            click.echo(f"wrong   {fault}")
        return False
    if tracing is None:
        return True
    refusal = await tracing.fault()
    await tracing.close()
    advice = "is the collector running, and is OTEL_EXPORTER_OTLP_ENDPOINT right?"
    click.echo("ok      traces" if refusal is None else f"wrong   traces: {refusal}; {advice}")
    return refusal is None
