"""Streams of upstreams with what a job makes of them, written for this project."""
