"""The Grafana dashboard, as a list of rows of panels. `make docs` writes it to where the chart and compose take it from.

Every panel answers a question that stands in its description; those that an alert is about stand near what explains it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["PATH", "dashboard"]

PATH = Path(__file__).parent.parent / "helm/streamworker/files/dashboard.json"

WHERE = 'namespace=~"$namespace", job=~"$job"'
"""Compose has no namespaces: a label that is absent is matched by the `.*` of "All"."""

_COLUMNS = 24
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}


class Panel(NamedTuple):
    """One panel: what it asks, its queries by legend, and the unit in Grafana's words."""

    title: str
    asks: str
    unit: str
    queries: dict[str, str]
    width: int = 8
    kind: str = "timeseries"
    is_stacked: bool = False


def rate(metric: str, *by: str, where: str = "") -> str:
    """Return a rate per second, summed."""
    return f"sum{_by(by)} (rate(streamworker_{metric}{{{_and(where)}}}[$__rate_interval]))"


def total(metric: str, *by: str, where: str = "") -> str:
    """Return a gauge, summed."""
    return f"sum{_by(by)} (streamworker_{metric}{{{_and(where)}}})"


def worst(metric: str, *by: str, where: str = "") -> str:
    """Return a gauge's largest value."""
    return f"max{_by(by)} (streamworker_{metric}{{{_and(where)}}})"


def quantiles(metric: str, *by: str, of: tuple[float, ...] = (0.5, 0.99)) -> dict[str, str]:
    """Return quantiles of a histogram, by legend."""
    name = "".join(f" {{{{{label}}}}}" for label in by)
    buckets = rate(f"{metric}_bucket", *by, "le")
    return {f"p{quantile * 100:g}{name}": f"histogram_quantile({quantile}, {buckets})" for quantile in of}


def _and(where: str) -> str:
    return f"{WHERE}, {where}" if where else WHERE


def _by(labels: tuple[str, ...]) -> str:
    return f" by ({', '.join(labels)})" if labels else ""


ROWS: dict[str, list[Panel]] = {
    "Is work done?": [
        Panel("Workers ready", "How many take up jobs.", "none", {"": total("ready")}, 4, "stat"),
        Panel("Jobs open", "How many streams run now.", "none", {"": total("jobs_open")}, 4, "stat"),
        Panel("Records behind", "How many wait in Kafka, as the workers know.", "none", {"": total("records_behind")}, 4, "stat"),
        Panel("Oldest open job", "How long a stream has gone on at most.", "s", {"": worst("oldest_job_age_seconds")}, 4, "stat"),
        Panel("Dead letters", "How many records of the last hour were no jobs, or ended as poison.", "none",
              {"": f"sum (increase(streamworker_dead_letters_total{{{WHERE}}}[1h]))"}, 4, "stat"),
        Panel("Starts", "How often processes started in the last hour, the first time not counted.", "none",
              {"": f"sum (changes(streamworker_start_time_seconds{{{WHERE}}}[1h]))"}, 4, "stat"),
        Panel("Jobs ended", "How jobs end.", "reqps", {"{{status}}": rate("jobs_ended_total", "status")}, is_stacked=True),
        Panel("Errors", "Why they end badly, by code.", "reqps", {"{{code}}": rate("job_errors_total", "code")}, is_stacked=True),
        Panel("Time in the queue", "How long jobs lie in Kafka before a worker takes them up.", "s", quantiles("queue_seconds", of=(0.5, 0.9, 0.99))),
    ],
    "What readers see": [
        Panel("Time to the first delta", "From the attempt's start, by upstream.", "s", quantiles("time_to_first_delta_seconds", "upstream")),
        Panel("Gap between deltas", "Between two reads of one stream, by upstream.", "s", quantiles("delta_gap_seconds", "upstream")),
        Panel("Duration of a job", "From the attempt's start to its terminal event.", "s", quantiles("job_duration_seconds", "upstream")),
        Panel("Events", "What is handed to Kafka, by type.", "cps", {"{{type}}": rate("events_total", "type")}),
        Panel("Bytes", "Payload of events, before compression.", "Bps", {"{{type}}": rate("event_bytes_total", "type")}),
        Panel("Tokens", "Prompt and completion, by who counted them.", "cps",
              {"{{kind}} ({{source}})": rate("tokens_total", "kind", "source")}, is_stacked=True),
    ],
    "Upstreams": [
        Panel("Circuits", "0 closed, 1 half-open, 2 open.", "none", {"{{upstream}}": worst("upstream_circuit_state", "upstream")}),
        Panel("Streams", "Calls that are open, and how many may be.", "none", {
            "{{upstream}} open": total("upstream_streams_open", "upstream"),
            "{{upstream}} limit": total("upstream_streams_limit", "upstream"),
            "{{upstream}} waiting": total("upstream_jobs_waiting", "upstream"),
        }),
        Panel("Tries that failed", "And were followed by another, by code.", "reqps", {"{{upstream}} {{code}}": rate("retries_total", "upstream", "code")}),
        Panel("Jobs begun", "And attempts: more of these where streams broke.", "reqps", {
            "{{upstream}} jobs": rate("jobs_started_total", "upstream"),
            "{{upstream}} attempts": rate("attempts_total", "upstream"),
        }),
        Panel("Stand-ins", "Jobs that went to another upstream, and circuits that opened.", "reqps", {
            "{{upstream}} fallbacks": rate("fallbacks_total", "upstream"),
            "{{upstream}} circuit opened": rate("circuits_opened_total", "upstream"),
        }),
    ],
    "Kafka": [
        Panel("Commits", "From begin to durable.", "s", quantiles("commit_seconds")),
        Panel("Commit under way", "The slowest one of each worker; it should be near nothing.", "s", {"{{instance}}": worst("commit_busy_seconds", "instance")}),
        Panel("Size of a commit", "Records in one transaction; it grows under load.", "none", {
            **quantiles("commit_records"), "waiting": total("commit_waiting"),
        }),
        Panel("Acknowledgement of deltas", "How long a batch is on the way.", "s", quantiles("sink_batch_seconds")),
        Panel("Size of a batch", "Deltas in one batch; it grows under load.", "none", quantiles("sink_batch_records")),
        Panel("Bytes on the way", "Not acknowledged; at kafka.max_unacknowledged_bytes sockets are read no more.", "bytes",
              {"{{instance}}": worst("sink_unacknowledged_bytes", "instance")}),
        Panel("Failures", "Requests that failed and are made again, by who made them.", "reqps", {"{{part}}": rate("kafka_failures_total", "part")}),
        Panel("Heartbeat", "How long ago the group's coordinator answered.", "s", {"{{instance}}": worst("group_heartbeat_age_seconds", "instance")}),
        Panel("Offset map", "The largest of each worker, of what a commit can hold.", "percentunit", {"{{instance}}": worst("offset_map_fill_ratio", "instance")}),
    ],
    "The group": [
        Panel("Partitions", "Who owns how many, and those being taken over.", "none", {
            "{{instance}}": total("partitions_owned", "instance"),
            "{{instance}} opening": total("partitions_opening", "instance"),
        }),
        Panel("Rebalances", "How often, and how often a worker was shut out.", "none", {
            "rebalances": f"max (increase(streamworker_rebalances_total{{{WHERE}}}[$__rate_interval]))",
            "fenced": f"sum (increase(streamworker_partitions_fenced_total{{{WHERE}}}[$__rate_interval]))",
        }),
        Panel("Duration of a rebalance", "In which nothing is taken up.", "s", quantiles("rebalance_seconds")),
        Panel("Let go", "Jobs given to their next owner, by reason.", "reqps", {"{{reason}}": rate("jobs_abandoned_total", "reason")}),
        Panel("Duplicates avoided", "Records delivered again, and tombstones passed over.", "reqps", {
            "skipped": rate("records_skipped_total"), "tombstones": rate("tombstones_total"),
        }),
        Panel("Draining", "How long each drain has lasted.", "s", {"{{instance}}": worst("draining_seconds", "instance")}),
    ],
    "The process": [
        Panel("Loop lag", "How late the event loop comes to what is due: the sign of too little CPU.", "s", {"{{instance}}": worst("event_loop_lag_seconds", "instance")}),
        Panel("Poll loop", "How long ago it turned.", "s", {"{{instance}}": worst("poll_age_seconds", "instance")}),
        Panel("Crashes of attempts", "Bugs; job.crashed has the trace.", "none", {"": f"sum (increase(streamworker_job_crashes_total{{{WHERE}}}[$__rate_interval]))"}),
        Panel("CPU", "Cores in use; one event loop uses one at most.", "none",
              {"{{instance}}": f"sum by (instance) (rate(process_cpu_seconds_total{{{WHERE}}}[$__rate_interval]) and on (namespace, job, instance) streamworker_build_info)"}),
        Panel("Memory", "Resident.", "bytes", {"{{instance}}": f"sum by (instance) (process_resident_memory_bytes{{{WHERE}}} and on (namespace, job, instance) streamworker_build_info)"}),
        Panel("Open files", "Two or so per stream; and how many may be.", "none", {
            "{{instance}}": f"sum by (instance) (process_open_fds{{{WHERE}}} and on (namespace, job, instance) streamworker_build_info)",
            "limit": f"min (process_max_fds{{{WHERE}}} and on (namespace, job, instance) streamworker_build_info)",
        }),
        Panel("Versions", "What runs.", "none", {"{{version}}, Python {{python}}": f"count by (version, python) (streamworker_build_info{{{WHERE}}})"}),
    ],
}  # fmt: skip


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana keeps it."""
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
        "description": panel.asks,
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
    """Return the file's content, a panel a line: a change is seen where it was made."""
    whole = dashboard()
    panels = ",\n".join(json.dumps(panel) for panel in whole["panels"])
    rest = json.dumps({**whole, "panels": ["PANELS"]}, indent=2)
    return rest.replace('"PANELS"', panels) + "\n"


if __name__ == "__main__":
    PATH.write_text(text())
