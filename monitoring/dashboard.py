"""Define the Grafana dashboard, as rows of panels. `make docs` writes it to the file that the chart and compose use.

The description of a panel says what it shows. Panels that an alert is about are near the panels that explain it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["PATH", "dashboard"]

PATH = Path(__file__).parent.parent / "helm/streamworker/files/dashboard.json"

WHERE = 'namespace=~"$namespace", job=~"$job"'
"""Selects the chosen workers. In compose there are no namespaces: the `.*` of "All" also matches an absent label."""

_COLUMNS = 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Panel(NamedTuple):
    """One panel: its queries by legend, and its unit as Grafana names it."""

    title: str
    description: str
    unit: str
    queries: dict[str, str]
    width: int = 8
    kind: str = "timeseries"
    is_stacked: bool = False


def rate(metric: str, *by: str, where: str = "") -> str:
    """Return the query for the sum of a counter's rates per second."""
    return f"sum{_by(by)} (rate(streamworker_{metric}{{{_and(where)}}}[$__rate_interval]))"


def total(metric: str, *by: str, where: str = "") -> str:
    """Return the query for the sum of a gauge."""
    return f"sum{_by(by)} (streamworker_{metric}{{{_and(where)}}})"


def worst(metric: str, *by: str, where: str = "") -> str:
    """Return the query for the largest value of a gauge."""
    return f"max{_by(by)} (streamworker_{metric}{{{_and(where)}}})"


def quantiles(metric: str, *by: str, of: tuple[float, ...] = (0.5, 0.99)) -> dict[str, str]:
    """Return the queries for quantiles of a histogram, by legend."""
    name = "".join(f" {{{{{label}}}}}" for label in by)
    buckets = rate(f"{metric}_bucket", *by, "le")
    return {f"p{quantile * 100:g}{name}": f"histogram_quantile({quantile}, {buckets})" for quantile in of}


def _and(where: str) -> str:
    return f"{WHERE}, {where}" if where else WHERE


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


ROWS: dict[str, list[Panel]] = {
    "Work done": [
        Panel("Workers ready", "Workers that accept jobs.", "none", {"": total("ready")}, 4, "stat"),
        Panel("Open jobs", "Jobs that were accepted and have not ended.", "none", {"": total("jobs_open")}, 4, "stat"),
        Panel("Records behind", "Records of the workers' partitions that are not accepted yet.", "none", {"": total("records_behind")}, 4, "stat"),
        Panel("Oldest open job", "Age of the oldest open job.", "s", {"": worst("oldest_job_age_seconds")}, 4, "stat"),
        Panel("Dead letters", "Records of the last hour that were not valid jobs, or that killed their workers.", "none",
              {"": f"sum (increase(streamworker_dead_letters_total{{{WHERE}}}[1h]))"}, 4, "stat"),
        Panel("Starts", "Restarts of worker processes in the last hour.", "none",
              {"": f"sum (changes(streamworker_start_time_seconds{{{WHERE}}}[1h]))"}, 4, "stat"),
        Panel("Jobs ended", "Terminal events by status.", "reqps", {"{{status}}": rate("jobs_ended_total", "status")}, is_stacked=True),
        Panel("Errors", "Terminal events with an error, by code.", "reqps", {"{{code}}": rate("job_errors_total", "code")}, is_stacked=True),
        Panel("Errors by model", "Terminal events with an error, by upstream and model; other: models that the settings do not list by name.", "reqps",
              {"{{upstream}} {{model}}": rate("job_errors_total", "upstream", "model")}, is_stacked=True),
        Panel("Time in the queue", "From the record's timestamp until a worker accepts the job.", "s", quantiles("queue_duration_seconds", of=(0.5, 0.9, 0.99))),
    ],
    "What readers see": [
        Panel("Time to first delta", "From the start of the attempt, by upstream.", "s", quantiles("time_to_first_delta_seconds", "upstream")),
        Panel("Gap between deltas", "Between two reads of one stream that brought deltas, by upstream.", "s", quantiles("delta_gap_seconds", "upstream")),
        Panel("Job duration", "From the start of the attempt to its terminal event, by upstream.", "s", quantiles("job_duration_seconds", "upstream")),
        Panel("Events", "Events published to Kafka, by type.", "cps", {"{{type}}": rate("events_total", "type")}),
        Panel("Bytes", "Payload of published events and results, before compression.", "Bps", {
            "{{type}}": rate("event_bytes_total", "type"),
            "result": rate("result_bytes_total"),
        }),
        Panel("Results", "Records of the results topic, and parts that were left out for their size.", "cps", {
            "results": rate("results_total"),
            "without {{part}}": rate("result_parts_omitted_total", "part"),
        }),
        Panel("Tokens", "Prompt and completion tokens, by source of the count.", "cps",
              {"{{kind}} ({{source}})": rate("tokens_total", "kind", "source")}, is_stacked=True),
        Panel("Jobs by metadata", "Terminal events by the value of telemetry.label_metadata, such as a tenant.", "reqps",
              {"{{value}} {{status}}": rate("jobs_by_metadata_total", "value", "status")}, is_stacked=True),
        Panel("Tokens by metadata", "Tokens by the value of telemetry.label_metadata.", "cps",
              {"{{value}} {{kind}}": rate("tokens_by_metadata_total", "value", "kind")}, is_stacked=True),
    ],
    "Upstreams": [
        Panel("Circuits", "0 closed, 1 half-open, 2 open.", "none", {"{{upstream}}": worst("upstream_circuit_state", "upstream")}),
        Panel("Streams", "Open calls, their limit, and jobs that wait for a slot.", "none", {
            "{{upstream}} open": total("upstream_streams_open", "upstream"),
            "{{upstream}} limit": total("upstream_streams_limit", "upstream"),
            "{{upstream}} waiting": total("upstream_jobs_waiting", "upstream"),
        }),
        Panel("Held jobs", "Jobs that wait because their upstream is unavailable, refuses the key or the account, or limits its calls.", "none",
              {"{{upstream}}": total("upstream_jobs_held", "upstream")}, is_stacked=True),
        Panel("Failed tries", "Tries that failed and were followed by another, by code.", "reqps", {"{{upstream}} {{code}}": rate("retries_total", "upstream", "code")}),
        Panel("Jobs started", "Jobs and attempts; there are more attempts than jobs where streams broke.", "reqps", {
            "{{upstream}} jobs": rate("jobs_started_total", "upstream"),
            "{{upstream}} attempts": rate("attempts_total", "upstream"),
        }),
        Panel("Fallbacks", "Jobs that went to another upstream, and circuits that opened.", "reqps", {
            "{{upstream}} fallbacks": rate("fallbacks_total", "upstream"),
            "{{upstream}} circuit opened": rate("circuits_opened_total", "upstream"),
        }),
    ],
    "Kafka": [
        Panel("Commits", "From the start of a commit until it is durable.", "s", quantiles("commit_duration_seconds")),
        Panel("Commit in progress", "Age of the oldest commit in progress of each worker; normally near zero.", "s", {"{{instance}}": worst("commit_in_progress_seconds", "instance")}),
        Panel("Commit size", "Records in one commit; it grows under load.", "none", {
            **quantiles("commit_records"), "waiting": total("commit_pending_entries"),
        }),
        Panel("Acknowledgement of deltas", "From the sending of a batch to its acknowledgement.", "s", quantiles("sink_batch_duration_seconds")),
        Panel("Batch size", "Deltas in one batch; it grows under load.", "none", quantiles("sink_batch_records")),
        Panel("Unacknowledged bytes", "Above kafka.max_unacknowledged_bytes the worker stops reading upstreams.", "bytes",
              {"{{instance}}": worst("sink_unacknowledged_bytes", "instance")}),
        Panel("Kafka failures", "Requests to Kafka that failed and are repeated, by part of the worker.", "reqps", {"{{part}}": rate("kafka_failures_total", "part")}),
        Panel("Heartbeat age", "Time since the group coordinator last answered a heartbeat.", "s", {"{{instance}}": worst("group_heartbeat_age_seconds", "instance")}),
        Panel("Offset map", "Largest offset map of each worker, as a share of what commit metadata can hold.", "percentunit", {"{{instance}}": worst("offset_map_fill_ratio", "instance")}),
    ],
    "The group": [
        Panel("Partitions", "Owned by each worker, and assigned but not opened yet.", "none", {
            "{{instance}}": total("partitions_owned", "instance"),
            "{{instance}} opening": total("partitions_opening", "instance"),
        }),
        Panel("Rebalances", "Rebalances of the group, and partitions whose owner was fenced.", "none", {
            "rebalances": f"max (increase(streamworker_rebalances_total{{{WHERE}}}[$__rate_interval]))",
            "fenced": f"sum (increase(streamworker_partitions_fenced_total{{{WHERE}}}[$__rate_interval]))",
        }),
        Panel("Rebalance duration", "No records are fetched during a rebalance.", "s", quantiles("rebalance_duration_seconds")),
        Panel("Moves", "Partitions that wait for their open streams before they move, and moves that did not wait to the end.", "none", {
            "waiting": total("moves_waiting"),
            "deferred": f"sum (increase(streamworker_moves_deferred_total{{{WHERE}}}[$__rate_interval]))",
            "forced": f"sum (increase(streamworker_moves_forced_total{{{WHERE}}}[$__rate_interval]))",
        }),
        Panel("Move wait", "From the promise of a partition to its move; its new jobs wait meanwhile.", "s", quantiles("move_wait_seconds")),
        Panel("Closed streams", "Open streams that were closed because their partition was lost; they are paid for again.", "none",
              {"{{instance}}": f"sum by (instance) (increase(streamworker_streams_cut_total{{{WHERE}}}[$__rate_interval]))"}),
        Panel("Abandoned jobs", "Jobs left to the next owner of their partition, by reason.", "reqps", {"{{reason}}": rate("jobs_abandoned_total", "reason")}),
        Panel("Lost records", "Job offsets that retention deleted, or that the brokers lost, before their jobs had ended.", "none",
              {"{{reason}}": f"sum by (reason) (increase(streamworker_records_lost_total{{{WHERE}}}[$__rate_interval]))"}),
        Panel("Skipped records", "Records that were delivered again although their job had ended or was running, job records that repeat an id, and tombstones.", "reqps", {
            "skipped": rate("records_skipped_total"), "duplicates": rate("duplicates_skipped_total"), "tombstones": rate("tombstones_total"),
        }),
        Panel("Cancel records", "Records of the control topic, by their effect on open jobs.", "none", {
            "{{effect}}": f"sum by (effect) (increase(streamworker_cancels_total{{{WHERE}}}[$__rate_interval]))",
        }),
        Panel("Draining", "Duration of each drain.", "s", {"{{instance}}": worst("draining_seconds", "instance")}),
    ],
    "The process": [
        Panel("Loop lag", "Delay of the event loop; it grows when there is too little CPU.", "s", {"{{instance}}": worst("event_loop_lag_seconds", "instance")}),
        Panel("Poll loop", "Time since the poll loop last completed a round.", "s", {"{{instance}}": worst("poll_age_seconds", "instance")}),
        Panel("Bugs", "Attempts that a bug ended, and bugs in logs or metrics, which end no job; the log events have the traces.", "none", {
            "crashed attempts": f"sum (increase(streamworker_job_crashes_total{{{WHERE}}}[$__rate_interval]))",
            "telemetry failures": f"sum (increase(streamworker_telemetry_failures_total{{{WHERE}}}[$__rate_interval]))"}),
        Panel("CPU", "Cores in use; one worker uses one at most.", "none",
              {"{{instance}}": f"sum by (instance) (rate(process_cpu_seconds_total{{{WHERE}}}[$__rate_interval]) and on (namespace, job, instance) streamworker_build_info)"}),
        Panel("Memory", "Resident memory.", "bytes", {"{{instance}}": f"sum by (instance) (process_resident_memory_bytes{{{WHERE}}} and on (namespace, job, instance) streamworker_build_info)"}),
        Panel("Open files", "File descriptors in use, and their limit.", "none", {
            "{{instance}}": f"sum by (instance) (process_open_fds{{{WHERE}}} and on (namespace, job, instance) streamworker_build_info)",
            "limit": f"min (process_max_fds{{{WHERE}}} and on (namespace, job, instance) streamworker_build_info)",
        }),
        Panel("Versions", "Running workers by version.", "none", {"{{version}}, Python {{python}}": f"count by (version, python) (streamworker_build_info{{{WHERE}}})"}),
    ],
    "The gateway": [
        Panel("Gateway streams", "Open event streams, chat completions and websockets, and the jobs that clients follow.", "none", {
            "{{face}}": total("gateway_streams_open", "face"), "subscriptions": total("gateway_subscriptions"),
        }),
        Panel("Gateway connections", "Open TCP connections; one process takes 10,000.", "none", {"{{instance}}": worst("gateway_connections", "instance")}),
        Panel("Events delivered", "Events written to clients.", "cps", {"{{face}}": rate("gateway_events_delivered_total", "face")}),
        Panel("Gateway requests", "Requests answered, by status.", "reqps", {"{{status}}": rate("gateway_requests_total", "status")}, is_stacked=True),
        Panel("Gateway errors", "Errors that clients were told, and refused credentials, by code.", "reqps", {
            "{{code}}": rate("gateway_errors_total", "code"), "refused: {{code}}": rate("gateway_auth_failures_total", "code"),
        }),
        Panel("Gateway request duration", "From the headers to the end of the response, but for streams and websockets.", "s", quantiles("gateway_request_duration_seconds", "route")),
        Panel("Gateway jobs", "Jobs submitted, requests that were answered with an earlier job, and cancel records.", "reqps", {
            "{{face}}": rate("gateway_jobs_submitted_total", "face"),
            "joined: {{cause}}": rate("gateway_jobs_joined_total", "cause"),
            "cancelled: {{face}}": rate("gateway_cancels_written_total", "face"),
        }),
        Panel("Acknowledgement of jobs", "From writing a job to its acknowledgement by all in-sync replicas.", "s", quantiles("gateway_submit_duration_seconds")),
        Panel("Gateway streams closed", "Streams, websockets and subscriptions that ended, by reason.", "reqps",
              {"{{face}} {{reason}}": rate("gateway_streams_closed_total", "face", "reason")}, is_stacked=True),
        Panel("Replays", "Reads of past events, by where they begin, and clients that fell behind.", "reqps", {
            "{{kind}}": rate("gateway_replays_total", "kind"), "overflows": rate("gateway_mailbox_overflows_total"),
        }),
        Panel("Scanned records", "Records that replays read from Kafka, and that searches passed.", "cps", {
            "replays": rate("gateway_records_scanned_total"),
            "searches {{outcome}}": rate("gateway_searched_records_total", "outcome"),
        }),
        Panel("Searches", "Duration of searches for a job's first event, by outcome.", "s", quantiles("gateway_search_duration_seconds", "outcome")),
        Panel("Followed partitions", "Partitions of the events topic that each gateway reads.", "none", {"{{instance}}": worst("gateway_partitions_followed", "instance")}),
        Panel("Batches", "Batches that the gateways keep and that have not ended, by status, and those that run.", "none", {
            "{{status}}": worst("gateway_batches", "status", where='status=~"validating|in_progress|finalizing|cancelling"'),
            "running": total("gateway_batches_running"),
        }),
        Panel("Batch lines", "Lines of batches that have ended by outcome, batches that have ended by status, and runs that failed by cause.", "cps", {
            "{{outcome}}": rate("gateway_batch_lines_total", "outcome"),
            "batches {{status}}": rate("gateway_batches_ended_total", "status"),
            "failed runs: {{cause}}": rate("gateway_batch_run_failures_total", "cause"),
        }),
        Panel("Batch duration", "From the creation of a batch to its end.", "s", quantiles("gateway_batch_duration_seconds", "status")),
        Panel("Recent events", "Recent records in memory, for clients that reconnect; 128 MiB at most.", "bytes", {"{{instance}}": worst("gateway_history_bytes", "instance")}),
    ],
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana stores it."""
    return {
        "uid": "streamworker",
        "title": "streamworker",
        "tags": ["streamworker"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {"list": [_source(), _variable("namespace"), _variable("job", 'namespace=~"$namespace"')]},
        "annotations": {"list": []},
        "panels": list(_laid_out()),
    }  # fmt: skip


def _laid_out() -> list[dict[str, Any]]:
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS.items():
        panels.append(
            {
                "type": "row",
                "title": title,
                "collapsed": False,
                "panels": [],
                "gridPos": _at(0, y, _COLUMNS, 1),
            }
        )
        x, y, height = 0, y + 1, 0
        for panel in row:
            if x + panel.width > _COLUMNS:
                x, y, height = 0, y + height, 0
            size = 4 if panel.kind == "stat" else 8
            panels.append(_panel(panel, _at(x, y, panel.width, size)))
            x, height = x + panel.width, max(height, size)
        y += height
    return [{"id": number, **panel} for number, panel in enumerate(panels, start=1)]


def _panel(panel: Panel, at: dict[str, int]) -> dict[str, Any]:
    style: dict[str, Any] = {"fillOpacity": 20 if panel.is_stacked else 0, "showPoints": "never"}
    if panel.is_stacked:
        style |= {"stacking": {"mode": "normal", "group": "A"}}
    targets = [
        {
            "refId": chr(ord("A") + index),
            "datasource": _DATASOURCE,
            "expr": query,
            "legendFormat": legend or "__auto",
        }
        for index, (legend, query) in enumerate(panel.queries.items())
    ]
    options: dict[str, Any] = (
        {"reduceOptions": {"calcs": ["lastNotNull"]}, "colorMode": "none", "graphMode": "area"}
        if panel.kind == "stat"
        else {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        }
    )
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": at,
        "targets": targets,
        "fieldConfig": {
            "defaults": {"unit": panel.unit, "min": 0, "custom": {} if panel.kind == "stat" else style},
            "overrides": [],
        },
        "options": options,
    }


def _at(x: int, y: int, w: int, h: int) -> dict[str, int]:
    return {"x": x, "y": y, "w": w, "h": h}


def _source() -> dict[str, Any]:
    return {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"}


def _variable(label: str, where: str = "") -> dict[str, Any]:
    query = f"label_values(streamworker_build_info{{{where}}}, {label})"
    return {
        "name": label,
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": label},
        "refresh": 2,
        "includeAll": True,
        "allValue": ".*",
        "multi": True,
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def text() -> str:
    """Return the content of the file, one panel per line, so that a diff shows which panel changed."""
    whole = dashboard()
    panels = ",\n".join(json.dumps(panel) for panel in whole["panels"])
    rest = json.dumps({**whole, "panels": ["PANELS"]}, indent=2)
    return rest.replace('"PANELS"', panels) + "\n"


if __name__ == "__main__":
    PATH.write_text(text())
