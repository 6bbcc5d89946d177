"""Runs the engines of the batches that this gateway owns."""

from __future__ import annotations

import asyncio
import time
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Final

import msgspec
import structlog

from streamworker.batch.engine import Engine
from streamworker.batch.errors import BatchError, InvalidInput, RunStopped
from streamworker.batch.index import State
from streamworker.batch.options import BatchOptions, Stop
from streamworker.errors import StreamworkerError
from streamworker.gateway.batches.records import cancellation_key, run_key
from streamworker.gateway.batches.run_files import RunOutput, StateRunStore, fetch_input
from streamworker.kafka.shares import PartitionShare
from streamworker.redaction import without_message
from streamworker.telemetry import gateway_metrics as table

if TYPE_CHECKING:
    from streamworker.batch.files import LocalInput
    from streamworker.config import Settings
    from streamworker.gateway.batches.records import BatchRecord
    from streamworker.gateway.batches.store import FileStore
    from streamworker.gateway.batches.topic import StateTopic
    from streamworker.telemetry.metrics import Metrics

__all__ = ["Runner", "window_s"]

log = structlog.get_logger()

PROGRESS_S: Final = 1.0
"""How often the counts of a batch are written, if they have changed."""

RETRY_S: Final = (2, 5, 15, 60)
"""How long a run that failed waits before it starts again; the last one holds for all later failures."""

SWEEP_S: Final = 60.0
STOP_S: Final = 5.0

_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def window_s(text: str) -> int | None:
    """Return a completion window such as `24h` in seconds; None if it is not one."""
    number, unit = text[:-1], text[-1:]
    if not (number.isascii() and number.isdecimal() and len(number) < 7 and unit in _UNITS):
        return None
    return int(number) * _UNITS[unit] or None


class Runner:
    """One task for each unfinished batch in the partitions that this gateway owns, at most `batch.max_running`."""

    def __init__(self, settings: Settings, topic: StateTopic, store: FileStore, metrics: Metrics) -> None:
        self._settings = settings
        self._metrics = metrics
        self._topic = topic
        self._store = store
        self._share = PartitionShare(settings.kafka, topic.topic, settings.batch.group_id, self._schedule)
        self._running: dict[str, _Run] = {}
        self._sweeping: asyncio.Task[None] | None = None
        self._is_stopping = False

    @property
    def running(self) -> int:
        """Number of batches that this process runs now."""
        return len(self._running)

    async def start(self) -> None:
        """Join the group of owners. Raises KafkaError."""
        await self._share.start()
        self._sweeping = asyncio.create_task(self._sweep_repeatedly(), name="sweep of batches")

    async def stop(self) -> None:
        """Stop all runs, which another gateway continues. Bounded in time; never raises."""
        self._is_stopping = True  # a run that was released must not begin again
        if self._sweeping is not None:
            self._sweeping.cancel()
        for run in self._running.values():
            run.release()
        tasks = [run.task for run in self._running.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=STOP_S)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=STOP_S)
        await self._share.stop()

    def changed(self, id_: str) -> None:
        """Take notice of a record about a file or a batch."""
        if (run := self._running.get(id_)) is not None and self._topic.table.is_cancelled(id_):
            run.cancel()
        self._schedule()

    def _schedule(self) -> None:
        if self._is_stopping or not self._topic.is_ready:
            return
        owned = self._share.owned
        for batch_id, run in self._running.items():
            if self._topic.partition(batch_id) not in owned:
                run.release()
        for batch in self._topic.table.unfinished():
            if len(self._running) >= self._settings.batch.max_running:
                return
            if batch.id not in self._running and self._topic.partition(batch.id) in owned:
                self._begin(batch)

    def _begin(self, batch: BatchRecord) -> None:
        run = self._running[batch.id] = _Run(self._settings, self._topic, self._store, batch, self._metrics)

        def ended(_: asyncio.Task[None]) -> None:
            del self._running[batch.id]
            asyncio.get_running_loop().call_later(0, self._schedule)

        run.task.add_done_callback(ended)

    async def _sweep_repeatedly(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                await self._sweep()
            except (StreamworkerError, OSError) as error:
                log.warning("batches.sweep_failed", reason=str(error)[:300])

    async def _sweep(self) -> None:
        """Delete files and batches that have expired, in the partitions that this process owns."""
        for id_ in self._topic.table.expired(time.time(), self._settings.batch.kept_s):
            if self._topic.partition(id_) not in self._share.owned:
                continue
            if self._topic.table.file(id_) is not None:
                await self._store.delete(id_)
            else:
                await self._topic.write(id_, run_key(id_), None)
                await self._topic.write(id_, cancellation_key(id_), None)
            await self._topic.write(id_, id_, None)


class _Run:
    """One batch, from validation to its output files."""

    def __init__(
        self,
        settings: Settings,
        topic: StateTopic,
        store: FileStore,
        batch: BatchRecord,
        metrics: Metrics,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._counted = {"completed": batch.completed, "failed": batch.failed}
        self._topic = topic
        self._store = store
        self._batch = batch
        self._engine: Engine | None = None
        self._is_released = False
        self.task = asyncio.create_task(self._run(), name=f"batch {batch.id}")

    def cancel(self) -> None:
        """Cancel the jobs in flight; what has ended is kept."""
        if self._engine is not None:
            self._engine.stop(Stop.CANCEL, "the batch was cancelled")

    def release(self) -> None:
        """Stop without ending anything: another gateway owns the batch."""
        self._is_released = True
        if self._engine is not None:
            self._engine.stop(Stop.NOW, "another gateway has taken the batch over")
        else:
            self.task.cancel()

    async def _run(self) -> None:
        for wait_s in chain(RETRY_S, repeat(RETRY_S[-1])):
            try:
                await self._start()
            except (StreamworkerError, OSError) as error:
                cause = "unavailable"
                log.warning("batch.stopped", batch=self._batch.id, reason=str(error)[:300])
            except Exception as error:  # one batch must not end the gateway
                cause = "crashed"
                log.exception("batch.crashed", batch=self._batch.id, exc_info=without_message(error))
            else:
                return
            if self._is_released:
                return
            self._metrics.add(table.BATCH_RUN_FAILURES, 1, cause)
            await asyncio.sleep(wait_s)

    async def _start(self) -> None:
        """Run the batch from the place where the last owner stopped. Raises StreamworkerError."""
        file = self._topic.table.file(self._batch.input_file_id)
        if file is None:
            await self._fail([_error("input_file_deleted", "the input file was deleted")])
            return
        try:
            source = await fetch_input(self._store, file)
        except FileNotFoundError:
            await self._fail([_error("input_file_lost", "the store does not have the input file")])
            return
        output = RunOutput(
            self._batch,
            self._store,
            self._topic,
            kept_s=self._settings.batch.kept_s,
            finalizing=self._finalizing,
        )
        try:
            await self._work(source, output)
        finally:
            self._engine = None
            source.close()
            await output.close()

    async def _work(self, source: LocalInput, output: RunOutput) -> None:
        engine = self._new_engine(source, output)
        self._engine = engine
        try:
            await engine.prepare()
        except InvalidInput as error:
            await self._fail(_faults(engine) or [_error("empty_file", str(error))], total=engine.lines)
            return
        if engine.lines > self._settings.batch.max_lines:
            message = f"the file has more than {self._settings.batch.max_lines} lines"
            await self._fail([_error("too_many_lines", message)], total=engine.lines)
            return
        await self._save(
            status="in_progress",
            in_progress_at=self._batch.in_progress_at or int(time.time()),
            total=engine.lines,
            model=next(iter(engine.models), None) if len(engine.models) == 1 else None,
        )
        if self._topic.table.is_cancelled(self._batch.id):
            self.cancel()
        progress = asyncio.create_task(self._report_progress(engine))
        try:
            await engine.finish()
        finally:
            progress.cancel()
            await asyncio.wait([progress])
        await self._finish(engine, output)

    def _new_engine(self, source: LocalInput, output: RunOutput) -> Engine:
        settings, batch = self._settings, self._batch
        prefix = f"{batch.tenant}.b." if batch.tenant else "b."
        options = BatchOptions(
            run=batch.id,
            is_new_run=True,
            job_prefix=prefix,
            topic=settings.topics.batch or settings.topics.jobs[0],
            limit=settings.batch.max_lines + 1,  # no more are needed to refuse the file
            window=settings.batch.window,
            metadata={"tenant": batch.tenant} if batch.tenant else {},
            expires_in_s=max(1.0, batch.expires_at - time.time()),
            merges_deltas=settings.batch.merged_deltas,
            stops_on_refusals=False,
            fails_rest=True,
        )
        return Engine(settings, options, source, output, StateRunStore(self._topic, batch.id))

    async def _report_progress(self, engine: Engine) -> None:
        """Write the counts of ended lines while the batch runs."""
        while True:
            await asyncio.sleep(PROGRESS_S)
            completed, failed = _counts(engine)
            if (completed, failed) != (self._batch.completed, self._batch.failed):
                try:
                    await self._save(completed=completed, failed=failed)
                except StreamworkerError as error:
                    log.warning("batch.progress_not_written", batch=self._batch.id, reason=str(error)[:300])

    async def _finalizing(self) -> None:
        if self._is_released:
            raise BatchError("another gateway has taken the batch over")
        await self._save(status="finalizing", finalizing_at=int(time.time()))

    async def _finish(self, engine: Engine, output: RunOutput) -> None:
        completed, failed = _counts(engine)
        if self._topic.table.is_cancelled(self._batch.id) and engine.accounts.codes["batch_cancelled"]:
            status = "cancelled"
        elif engine.accounts.codes["batch_expired"]:
            status = "expired"
        else:
            status = "completed"
        await self._save(
            status=status,
            ended_at=int(time.time()),
            completed=completed,
            failed=failed,
            output_file_id=output.output_file_id,
            error_file_id=output.error_file_id,
            usage=engine.accounts.usage(),
        )
        self._count_end()
        log.info("batch.ended", batch=self._batch.id, status=status, completed=completed, failed=failed)

    async def _fail(self, errors: list[dict[str, Any]], *, total: int = 0) -> None:
        await self._save(status="failed", ended_at=int(time.time()), errors=errors, total=total)
        self._count_end()
        log.info("batch.ended", batch=self._batch.id, status="failed", errors=len(errors))

    def _count_end(self) -> None:
        status, ended_at = self._batch.status, self._batch.ended_at or 0
        self._metrics.add(table.BATCHES_ENDED, 1, status)
        self._metrics.observe(table.BATCH_DURATION, max(0, ended_at - self._batch.created_at), status)

    async def _save(self, **changes: Any) -> None:
        """Write the batch. Raises RunStopped if another owner has ended it."""
        self._batch = batch = msgspec.structs.replace(self._batch, **changes)
        await self._topic.write(batch.id, batch.id, batch)
        known = self._topic.table.batch(batch.id)
        if known is not None and known.has_ended and known != batch:
            await self._topic.write(batch.id, batch.id, known)  # the log's last record of a key stays
            self.release()  # not before: the end of the run cancels the task that writes its progress
            raise RunStopped("another gateway has ended this batch")
        self._count_lines()

    def _count_lines(self) -> None:
        """Count what has ended since the last count. A run that begins again counts its lines from 0."""
        for outcome, count in (("completed", self._batch.completed), ("failed", self._batch.failed)):
            if (more := count - self._counted[outcome]) > 0:
                self._counted[outcome] = count
                self._metrics.add(table.BATCH_LINES, more, outcome)


def _counts(engine: Engine) -> tuple[int, int]:
    counts = engine.counts()
    return counts[State.COMPLETED], counts[State.FAILED]


def _faults(engine: Engine) -> list[dict[str, Any]]:
    return [_error(fault.code.code, fault.message, line) for line, fault in engine.faults]


def _error(code: str, message: str, line: int | None = None) -> dict[str, Any]:
    return {"code": code, "message": message, "param": None, "line": line}
