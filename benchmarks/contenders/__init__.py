"""Who is measured: each a program of its own, told by its environment where jobs come from and events go.

The three that are not streamworker publish events of the same shape to the same kind of topics, acknowledged by all
replicas, idempotent, compressed with lz4, on uvloop; none of them keeps the promises of docs/delivery.md.
"""
