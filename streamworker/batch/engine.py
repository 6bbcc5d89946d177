"""Run a batch: lines in, jobs through Kafka, lines out.

Kafka has the record of the run, and the output files are a cache of it. Each step of a start makes the next one true: the
output is locked; the input is indexed; the output files show which lines are done; other processes of the run are fenced;
the job topic shows which lines were submitted; the topic of endings is read to its present end. The other lines have never
been submitted.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from streamworker.batch.collector import Collector
from streamworker.batch.errors import InvalidInput, RunRefused, RunStopped
from streamworker.batch.history import History
from streamworker.batch.identity import JobIds
from streamworker.batch.index import State
from streamworker.batch.intake import Intake
from streamworker.batch.jobs import JobWriter
from streamworker.batch.ledger import Ledger
from streamworker.batch.lines import Fault, FaultCode, read_line
from streamworker.batch.messages import (
    changes_text,
    count_of_lines,
    faults_text,
    named_topics,
    unfinished_text,
)
from streamworker.batch.open_lines import ANY_OPEN, OpenLines
from streamworker.batch.options import BatchOptions, Outcome, Stop
from streamworker.batch.output import CANCELLED, fault_line
from streamworker.batch.record import InputFacts, RunRecord
from streamworker.batch.restore import Restore
from streamworker.batch.submission import Submission
from streamworker.batch.topics import RunTopics
from streamworker.batch.watch import Expiry, Watch
from streamworker.errors import KafkaUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence

    from streamworker.batch.accounting import Accounts
    from streamworker.batch.ports import BatchInput, BatchOutput, RunStore
    from streamworker.batch.progress import Snapshot
    from streamworker.config import Settings

__all__ = ["BatchOptions", "Engine", "Outcome", "Stop"]

SYNC_S = 5.0
"""How often the output files are made durable."""

REFUSALS = 50
"""Endings in a row with a refused key or an empty account, after which the run stops by itself."""

CANCEL_S = 5.0
"""How long the endings of jobs that were cancelled by a second Ctrl-C are awaited."""

CANCEL_RUN_S = 60.0
"""How long the endings of jobs that `--cancel` cancelled are awaited."""

_FLUSH_S = 0.1
_POLL_S = 0.02
_TRANSACTIONAL = "streamworker-batch."


class Engine:
    """One start of one run. `run` is called once, `stop` and `snapshot` at any time in the same event loop.

    The caller locks the output before, and closes it afterwards.
    """

    def __init__(
        self,
        settings: Settings,
        options: BatchOptions,
        source: BatchInput,
        output: BatchOutput,
        store: RunStore,
        *,
        note: Callable[[str], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`note` is called with texts for people; `clock` returns seconds."""
        self.phase = f"reading {source.name}"
        """What the run does now, for people."""
        self.is_working = False
        """Whether lines are being submitted and awaited."""
        self.has_worked = False
        """Whether lines were submitted or awaited by this start."""
        self.has_begun = False
        """Whether `finish` was called: before it, nothing is written or sent."""
        self.record: RunRecord | None = None
        self._settings = settings
        self._options = options
        self._source = source
        self._output = output
        self._store = store
        self._note = note
        self._name(options.run or _new_name())
        self._intake = Intake(
            source, limit=options.limit, max_job_bytes=settings.worker.max_job_bytes, writer=self._writer()
        )
        self.ledger = Ledger(self._intake.index, output, clock)
        self._restore: Restore | None = None
        self._stop: Stop | None = None
        self._reason = ""
        self._changed = asyncio.Event()
        self._stopped_now = asyncio.Event()
        self._submission: Submission | None = None

    @property
    def accounts(self) -> Accounts:
        """Tokens and codes of the lines that have ended."""
        return self.ledger.accounts

    @property
    def models(self) -> Mapping[str, int]:
        """Lines by model, after `prepare`."""
        return self._intake.models

    @property
    def faults(self) -> Sequence[tuple[int, Fault]]:
        """The first lines that are not valid, with their numbers, after `prepare` has raised InvalidInput."""
        return self._intake.faults

    @property
    def lines(self) -> int:
        """Number of lines that were read."""
        return len(self._intake.index)

    def counts(self) -> dict[State, int]:
        """Return the number of lines by state."""
        return {state: self._intake.index.counts[state] for state in State}

    def snapshot(self) -> Snapshot:
        """Return the progress of the run."""
        return self.ledger.snapshot()

    def stop(self, how: Stop, reason: str = "it was stopped") -> None:
        """Stop the run before its end. `run` then raises RunStopped, unless every line has ended meanwhile."""
        if self._stop is None or how > self._stop:
            self._stop, self._reason = how, reason
            self._wake()

    async def run(self) -> Outcome:
        """Run the batch; return when every line is in one of the files.

        Raises:
            BatchError: see its classes; `exit_code` says whether to run it again.
            KafkaError: the brokers cannot be reached, or refuse a request.
        """
        await self.prepare()
        return await self.finish()

    # Before anything is sent

    async def prepare(self) -> None:
        """Index the input, and read what earlier runs have written. Nothing is written or sent.

        Raises:
            InvalidInput: lines are not valid, or were edited since they were done.
            RunRefused: the output files or the run's record do not fit.
        """
        await self._intake.run()
        self._refuse_faults()
        options = self._options
        if options.overwrites:
            return
        self.record = await self._store.load()
        self._check_record()
        self.phase = "reading the output of earlier runs"
        is_retrying = self._output.is_retrying
        round_ = (self.record.round if self.record else 0) + (not is_retrying)
        self._restore = Restore(
            self._intake.index,
            self.accounts,
            changed=options.changed,
            retry=None if is_retrying else options.retry_failed,
            round_=round_,
        )
        await self._restore.run(self._output)
        self._refuse_changes(self._restore)

    def _refuse_faults(self) -> None:
        intake = self._intake
        if not len(intake.index):
            raise InvalidInput(f"{self._source.name} has no line")
        if intake.faulty and not self._options.skips_invalid:
            raise InvalidInput(faults_text(self._source.name, intake))

    def _check_record(self) -> None:
        record, name = self.record, self._options.run
        if record is None:
            if self._output.is_retrying:
                raise RunRefused(
                    "a round of --retry-failed is unfinished, and the run.json file of its run is missing: restore it, or use "
                    "--overwrite"
                )
            return
        if name is not None and name != record.run:
            raise RunRefused(
                f"the output belongs to the run {record.run}, not to {name}: leave --batch-id out, name another file with -o, "
                "or use --overwrite"
            )
        self._name(record.run)

    def _refuse_changes(self, restore: Restore) -> None:
        if restore.changes and self._options.changed == "fail":
            raise InvalidInput(changes_text(self._source.name, restore))
        if restore.absent:
            self._note(
                f"{count_of_lines(restore.absent)} in the output and not in {self._source.name}; nothing is removed"
            )

    # The run

    async def finish(self) -> Outcome:
        """Run the rest after `prepare`. Raises as `run` does."""
        self.has_begun = True
        restore, index = self._restore, self._intake.index
        has_work = restore is None or restore.has_work
        if self.ledger.is_complete and not has_work and self._output.is_finished and not self._options.sorts:
            return self._outcome(self._output.names)
        needs_jobs = any(index.counts[state] for state in (State.PENDING, State.SUBMITTED, State.UNKNOWN))
        if not needs_jobs:
            await self._begin_output()
            await self._write_faults()
            return await self._finished()
        topics = RunTopics(self._settings, self._options.topic, f"{_TRANSACTIONAL}{self.run_name}")
        try:
            await self._connect(topics)
            await self._begin_output()
            await self._write_faults()
            history = History(topics, index, self._ids, self._known_record)
            await self._read_back(topics, history)
            await self._work(topics, history)
        finally:
            self.is_working = False
            await topics.close()
        if not self.ledger.is_complete:
            raise RunStopped(unfinished_text(index, self._reason))
        return await self._finished()

    async def _connect(self, topics: RunTopics) -> None:
        """Connect, and find out where the run's records begin. Raises KafkaError."""
        self.phase = f"connecting to {self._settings.kafka.bootstrap_servers}"
        limit = asyncio.timeout(self._options.timeout_s)
        try:
            async with limit:
                await topics.open()
                if self.record is None:
                    self.record = await self._new_record(topics)
        except TimeoutError:
            if not limit.expired():
                raise
            raise KafkaUnavailable(
                f"{self.phase}: no answer within {self._options.timeout_s:g} s; is kafka.bootstrap_servers right?"
            ) from None
        if self.record.topics != topics.names:
            raise RunRefused(
                f"the run {self.record.run} was started with {named_topics(self.record.topics)}, and would go on with "
                f"{named_topics(topics.names)}: restore these settings, or use --overwrite"
            )

    async def _new_record(self, topics: RunTopics) -> RunRecord:
        """Return the record of a first start: a new name has no records yet, a given one may have."""
        is_new = self._options.run is None or self._options.is_new_run
        find = topics.ends if is_new else topics.beginnings
        now = time.time_ns() // 1_000_000
        expires = self._options.expires_in_s
        record = RunRecord(
            run=self.run_name,
            created=now,
            input=InputFacts(path=self._source.name, bytes=self._intake.bytes, sha256=self._intake.sha256),
            topics=topics.names,
            start={},
            expires=None if expires is None else now + round(expires * 1000),
        )
        for topic in (topics.jobs, topics.endings):
            record = record.with_offsets(topic, await find(topic))
        return record

    async def _begin_output(self) -> None:
        """Make the output ready to append to, and the run's record durable, in this order."""
        await self._output.begin(anew=self._options.overwrites)
        restore = self._restore
        if self.record is not None:
            if restore is not None and restore.retried_lines:
                self.record = msgspec.structs.replace(self.record, round=restore.round)
            await self._store.save(self.record)
        if restore is not None:
            await self._output.drop(restore.dropped)
            if restore.retried_lines:
                await self._output.retry(restore.retried)

    async def _write_faults(self) -> None:
        index = self._intake.index
        for line in index.lines_in(State.FAULTY):
            text = await self._source.read(index.offsets[line], index.lengths[line])
            read = read_line(text)
            if not isinstance(read, Fault):  # the line is valid alone: its custom id or its size are not
                code = FaultCode(index.fault(line))
                message = (
                    "another line has this custom_id"
                    if code is FaultCode.DUPLICATE_CUSTOM_ID
                    else "its job is too large"
                )
                read = Fault(code, message, read.custom_id)
            self.ledger.refuse(
                line, fault_line(index.digest(line), read, index.numbers[line]), read.code.code
            )
        await self._output.flush()

    # Kafka has the record

    async def _read_back(self, topics: RunTopics, history: History) -> None:
        """Fence other processes of the run, and find the lines that were submitted."""
        self.phase = f"fencing other processes of the run {self.run_name}"
        await topics.fence()
        self.phase = f"reading {topics.jobs} for jobs of the run {self.run_name}"
        await history.find_losses()
        restore = self._restore
        if restore is not None and restore.retried_lines and self._options.run is not None:
            await self._number_round(restore, await history.next_round(restore.round))
        await history.mark_submitted()

    async def _number_round(self, restore: Restore, round_: int) -> None:
        if round_ == restore.round:
            return
        for line in restore.retried_lines:
            self._intake.index.set_round(line, round_)
        self.record = msgspec.structs.replace(self._known_record, round=round_)
        await self._store.save(self.record)

    async def _work(self, topics: RunTopics, history: History) -> None:
        record, note = self._known_record, self._note
        collector = Collector(
            self.ledger, self._source, self._output, topics, self._ids, record.offsets(topics.endings)
        )
        lines = OpenLines(self._settings, self.ledger, self._source, self._ids, self.run_name)
        expiry = Expiry(record.expires, self.ledger, lines, on_expired=self._wake, note=note)
        timeout_s = self._settings.kafka.request_timeout_s
        watch = Watch(self.ledger, self._source, topics, request_timeout_s=timeout_s, note=note)
        self._submission = Submission(
            self.ledger,
            self._source,
            topics,
            self._ids,
            self._writer(),
            window=self._options.window,
            note=self._note,
        )
        submission = self._submission

        async def main() -> None:
            await self._catch_up(topics, collector, history)
            if self._options.cancels:
                self._stop = self._stop or Stop.DRAIN
                await self._cancel_in_flight(lines, CANCEL_RUN_S)
            else:
                await self._submit(submission, lines, expiry)

        self.ledger.on_ending = self._wake
        self._wake()
        await collector.start()
        try:
            await self._first_of(
                main(),
                self._flush(topics, collector),
                collector.complete(),
                watch.run(partial(self._check_time, expiry)),
                _raised(collector.crashed),
            )
        finally:
            await collector.stop()
            await self._sync(topics, collector)

    async def _catch_up(self, topics: RunTopics, collector: Collector, history: History) -> None:
        """Read the endings to their present end; then only a line whose records are deleted can be unknown."""
        self.phase = f"reading {topics.endings} for endings of the run {self.run_name}"
        ends = await topics.ends(topics.endings)
        while not collector.has_reached(ends):  # noqa: ASYNC110 - the reader moves on without an event, too
            await asyncio.sleep(_POLL_S)
        if (unknown := history.mark_unknown()) and self._options.resubmits_unknown:
            self._note(f"{count_of_lines(unknown)} submitted again: retention has deleted their records")
            history.resubmit_unknown()

    async def _submit(self, submission: Submission, lines: OpenLines, expiry: Expiry) -> None:
        """Submit the lines, and wait for their endings."""
        self.is_working = self.has_worked = True
        await expiry.check()
        self._apply_limits()
        await submission.run()
        while self.ledger.submitted and self._stop is not Stop.CANCEL:
            self._changed.clear()
            await self._changed.wait()
        if self._stop is Stop.CANCEL:
            await self._cancel_in_flight(lines, CANCEL_S)
            if self._options.fails_rest:
                await lines.fail("batch_cancelled", CANCELLED, *ANY_OPEN)

    async def _first_of(
        self, main: Coroutine[None, None, None], *others: Coroutine[None, None, None]
    ) -> None:
        """Run all of them until `main` ends, one of the others fails, or the run is stopped at once."""
        tasks = [asyncio.create_task(work) for work in (main, *others, self._until_now())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_now(self) -> None:
        await self._stopped_now.wait()

    def _wake(self) -> None:
        self._apply_limits()
        self._changed.set()
        if self._stop is Stop.NOW:
            self._stopped_now.set()
        if self._submission is not None:
            self._submission.is_stopped = self._stop is not None or self.ledger.is_expired
            self._submission.wake()

    def _apply_limits(self) -> None:
        """Stop the run for its failures."""
        limit = self._options.max_errors
        if self._options.stops_on_refusals and self.ledger.refusals >= REFUSALS:
            self._stop_for(Stop.NOW, f"{REFUSALS} lines in a row have failed with {self.ledger.last_refusal}")
        elif limit is not None and self.ledger.failed_here >= limit:
            self._stop_for(Stop.DRAIN, f"{self.ledger.failed_here} lines have failed (--max-errors {limit})")

    def _stop_for(self, how: Stop, reason: str) -> None:
        if self._stop is None:
            self._stop, self._reason = how, reason
            self._note(f"{reason}: nothing more is submitted")

    # Beside the submission

    async def _flush(self, topics: RunTopics, collector: Collector) -> None:
        """Write the output every 0.1 s, and make it durable every 5 s."""
        loop = asyncio.get_running_loop()
        synced = loop.time()
        while True:
            await asyncio.sleep(_FLUSH_S)
            if self._output.buffered:
                await self._output.flush()
            collector.relieve()
            if self.ledger.is_dirty and loop.time() - synced >= SYNC_S:
                await self._sync(topics, collector)
                synced = loop.time()

    async def _sync(self, topics: RunTopics, collector: Collector) -> None:
        """Make the output durable. A later start reads the endings after it only."""
        positions = collector.positions()
        self.ledger.is_dirty = False
        if await self._output.sync():
            self.record = self._known_record.with_offsets(topics.endings, positions)
            await self._store.save(self.record)

    async def _check_time(self, expiry: Expiry) -> None:
        if self.is_working:
            await expiry.check()

    async def _cancel_in_flight(self, lines: OpenLines, seconds: float) -> None:
        """Cancel the jobs in flight, and wait for their endings, at most for `seconds`."""
        self.phase = f"cancelling {self.ledger.submitted:,} lines in flight"
        self.is_working = False
        await lines.cancel()
        try:
            async with asyncio.timeout(seconds):
                while self.ledger.submitted:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            self._note(
                f"{self.ledger.submitted:,} lines have not ended within {seconds:g} s of their cancellation"
            )

    # The end

    async def _finished(self) -> Outcome:
        """Give the files their names. Every line is in one of them."""
        self.phase = "finishing the output files"
        assert self.ledger.is_complete
        files = await self._output.finish(self._intake.index, sort=self._options.sorts)
        await self._store.remove()
        return self._outcome(files)

    def _outcome(self, files: Sequence[str]) -> Outcome:
        counts, record = self._intake.index.counts, self.record
        return Outcome(
            run=self.run_name,
            total=len(self._intake.index),
            completed=counts[State.COMPLETED],
            failed=counts[State.FAILED],
            files=files,
            created=time.time_ns() // 1_000_000 if record is None else record.created,
            expires=None if record is None else record.expires,
        )

    # Names

    @property
    def _known_record(self) -> RunRecord:
        assert self.record is not None
        return self.record

    def _name(self, run: str) -> None:
        self.run_name = run
        self._ids = JobIds(f"{self._options.job_prefix}{run}.")

    def _writer(self) -> JobWriter:
        options = self._options
        expires = None if self.record is None else self.record.expires
        if self.record is None and options.expires_in_s is not None:
            expires = 4_102_444_800_000  # a time of the same length, to measure records with
        return JobWriter(
            self._ids,
            self.run_name,
            metadata=options.metadata,
            on_break=options.on_break,
            upstream=options.upstream,
            expires_ms=expires,
            merges_deltas=options.merges_deltas,
        )


async def _raised(future: asyncio.Future[None]) -> None:
    await asyncio.shield(future)


def _new_name() -> str:
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
