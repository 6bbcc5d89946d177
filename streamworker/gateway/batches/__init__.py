"""`/v1/files` and `/v1/batches`: OpenAI's Batch API over the engine of `streamworker.batch`.

The state is in a compacted topic (`topics.batches`) that every gateway reads into memory. The files are in a folder or an
object store (`batch.files`). The gateway that owns a batch's partition in a consumer group runs its engine; another one
continues when it ends.
"""
