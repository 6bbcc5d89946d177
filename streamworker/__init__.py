"""Event-stream fan-out worker: prompt jobs from Kafka in, live deltas and one terminal event per job out."""

__version__ = "0.1.0"
