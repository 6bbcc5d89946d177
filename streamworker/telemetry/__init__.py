"""Logs, metrics, traces and probes of a running worker."""
