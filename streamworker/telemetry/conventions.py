"""Names of span attributes: OpenTelemetry's semantic conventions where they define one, else `streamworker.*`.

HTTP as of v1.44, which is stable; messaging and Kafka as of v1.44, generative AI as of v1.42. The latter are still in
development, so the names are defined in this module only.
"""

from __future__ import annotations

from typing import Final

# Messaging, and Kafka in particular
MESSAGING_SYSTEM: Final = "messaging.system"
MESSAGING_OPERATION_NAME: Final = "messaging.operation.name"
MESSAGING_OPERATION_TYPE: Final = "messaging.operation.type"
MESSAGING_DESTINATION: Final = "messaging.destination.name"
MESSAGING_PARTITION: Final = "messaging.destination.partition.id"
MESSAGING_GROUP: Final = "messaging.consumer.group.name"
MESSAGING_OFFSET: Final = "messaging.kafka.offset"

KAFKA: Final = "kafka"
PROCESS: Final = "process"

# Generative AI
GEN_AI_OPERATION: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_STREAM: Final = "gen_ai.request.stream"
GEN_AI_RESPONSE_ID: Final = "gen_ai.response.id"
GEN_AI_RESPONSE_MODEL: Final = "gen_ai.response.model"
GEN_AI_FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
GEN_AI_TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
GEN_AI_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
GEN_AI_REASONING_TOKENS: Final = "gen_ai.usage.reasoning.output_tokens"

CHAT: Final = "chat"
OPENAI: Final = "openai"
"""The provider by the conventions: the vendor of the API, not the host. `server.address` has the host."""

# General
ERROR_TYPE: Final = "error.type"
HTTP_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"
URL_PATH: Final = "url.path"
URL_SCHEME: Final = "url.scheme"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"

# Attributes without a convention
JOB_ID: Final = "streamworker.job.id"
JOB_STATUS: Final = "streamworker.job.status"
JOB_DELIVERIES: Final = "streamworker.job.deliveries"
JOB_TRIES: Final = "streamworker.job.tries"
JOB_ABANDONED: Final = "streamworker.job.abandoned"
"""Why the job was returned without a terminal event. A span has either this attribute or a status."""

UPSTREAM: Final = "streamworker.upstream"
ATTEMPT_ID: Final = "streamworker.attempt.id"
ATTEMPT_NUMBER: Final = "streamworker.attempt.number"
TRY_NUMBER: Final = "streamworker.try.number"
TRY_OUTCOME: Final = "streamworker.try.outcome"
"""The attempt's status if this try ended it, `retried` if another try follows, `abandoned` if the job was returned."""

USAGE_SOURCE: Final = "streamworker.usage.source"
USAGE_INPUT_TOKENS: Final = "streamworker.usage.input_tokens"
USAGE_OUTPUT_TOKENS: Final = "streamworker.usage.output_tokens"
"""The counts of the terminal event, also estimated ones. `gen_ai.usage.*` are only the upstream's own counts."""

FIRST_DELTA: Final = "first_delta"
"""A span event, at most one per try: a span per delta would cost more than the delta."""
