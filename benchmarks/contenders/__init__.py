"""The contenders: separate programs, which read the broker, the topics and the upstream from the environment.

The three that are not streamworker publish events of the same shape to the same kind of topics, with an idempotent
producer, `acks=all`, lz4 and uvloop. None of them has the guarantees of docs/delivery.md.
"""
