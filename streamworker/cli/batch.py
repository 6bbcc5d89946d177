"""`streamworker batch`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from streamworker.batch.accounting import read_price
from streamworker.batch.engine import Engine
from streamworker.batch.errors import BatchError, RunRefused
from streamworker.batch.files import LocalInput, LocalOutput, LocalRunStore, NoRunStore, sibling
from streamworker.batch.identity import RUN_PATTERN
from streamworker.batch.index import State
from streamworker.batch.jobs import MAX_METADATA
from streamworker.batch.options import BatchOptions, Stop
from streamworker.batch.progress import duration
from streamworker.batch.summary import RETRY_TEXT, ending_text, summary
from streamworker.cli.batch_progress import MODES, shown
from streamworker.cli.shared import config_option, quietly, run_async, settings_of, timeout_option
from streamworker.errors import KafkaError, KafkaUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streamworker.batch.accounting import Price
    from streamworker.batch.options import Outcome
    from streamworker.cli.batch_progress import Shown
    from streamworker.config import Settings

__all__ = ["batch"]

_CHUNK = 1 << 20

FINISHED, WITH_ERRORS, REFUSED, RUN_AGAIN, INTERRUPTED = 0, 1, 2, 3, 130

_RETRY_FAILED, _RETRIES = "--retry-failed", ("retriable", "all")

_DURATION = re.compile(r"(\d{1,6})([smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def _read_duration(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    if (found := _DURATION.fullmatch(value)) is None or not int(found[1]):
        raise click.BadParameter(
            f"{value!r} is not a valid duration: use 90s, 30m, 24h or 7d", context, parameter
        )
    return float(int(found[1]) * _SECONDS[found[2]])


def _read_metadata(
    context: click.Context, parameter: click.Parameter, value: Sequence[str]
) -> dict[str, str]:
    pairs = dict(text.partition("=")[::2] for text in value if "=" in text)
    if len(pairs) < len(value):
        raise click.BadParameter("takes KEY=VALUE, each key once", context, parameter)
    if len(pairs) > MAX_METADATA or {"batch_id", "custom_id"} & pairs.keys():
        message = f"takes at most {MAX_METADATA} members, and not batch_id and custom_id, which each job gets"
        raise click.BadParameter(message, context, parameter)
    return pairs


def _read_price(context: click.Context, parameter: click.Parameter, value: str | None) -> Price | None:
    try:
        return None if value is None else read_price(value)
    except ValueError as error:
        raise click.BadParameter(str(error), context, parameter) from None


def _read_run(context: click.Context, parameter: click.Parameter, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(RUN_PATTERN, value):
        raise click.BadParameter(f"{value!r} is not 1 to 64 of A-Z a-z 0-9 . _ -", context, parameter)
    return value


class _Command(click.Command):
    """The command, with an option whose value is optional: click alone takes the argument behind it for the value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Give `--retry-failed` its usual value where none follows it."""
        for at, arg in enumerate(args):
            if arg == "--":
                break
            if arg == _RETRY_FAILED and not (at + 1 < len(args) and args[at + 1] in _RETRIES):
                args = [*args[:at], f"{_RETRY_FAILED}={_RETRIES[0]}", *args[at + 1 :]]
        return super().parse_args(ctx, args)


@click.command(cls=_Command)
@config_option
@timeout_option
@click.argument("input", metavar="INPUT")
@click.option(
    "-o", "--output", metavar="FILE", help="Results; default: INPUT with .out before its suffix. - is stdout."
)
@click.option(
    "-e",
    "--errors",
    metavar="FILE",
    help="Failed lines; default: OUTPUT with .errors before its suffix; may be OUTPUT.",
)
@click.option(
    "--window",
    default=1000,
    show_default=True,
    type=click.IntRange(1, 1_000_000),
    help="Lines that are submitted and have not ended.",
)
@click.option("--topic", help="Job topic; default: topics.batch, or the first of topics.jobs.")
@click.option("--upstream", help="Name of a configured upstream.")
@click.option(
    "--metadata",
    "-d",
    multiple=True,
    metavar="KEY=VALUE",
    callback=_read_metadata,
    help="Copied into the events and results of every line; may be repeated.",
)
@click.option(
    "--on-break",
    type=click.Choice(["restart", "fail"]),
    default="restart",
    show_default=True,
    help="What a line does whose stream breaks.",
)
@click.option(
    "--expires-in",
    "expires_in_s",
    metavar="DURATION",
    callback=_read_duration,
    help="From the run's first start; lines that have not ended by then are batch_expired. Example: 24h.",
)
@click.option(
    "--skip-invalid", is_flag=True, help="Write faulty lines to ERRORS instead of refusing the file."
)
@click.option(
    _RETRY_FAILED,
    is_flag=False,
    flag_value=_RETRIES[0],
    type=click.Choice(_RETRIES),
    help="Run failed lines again: the retriable ones, or all.",
)
@click.option("--max-errors", type=click.IntRange(1), help="Stop submitting after this many failed lines.")
@click.option(
    "--changed",
    type=click.Choice(["fail", "keep", "rerun"]),
    default="fail",
    show_default=True,
    help="What happens to a line that is done and whose body was edited since.",
)
@click.option("--sort", "sorts", is_flag=True, help="Rewrite OUTPUT once, at the end, in the order of INPUT.")
@click.option(
    "--resubmit-unknown", is_flag=True, help="Run lines again whose records retention has deleted from Kafka."
)
@click.option("--limit", type=click.IntRange(1), help="The first lines of INPUT only.")
@click.option("--dry-run", is_flag=True, help="Validate and count; send nothing.")
@click.option(
    "--batch-id",
    "run",
    callback=_read_run,
    help="The run's name; default: a new one, kept in OUTPUT.run.json.",
)
@click.option(
    "--cancel", "cancels", is_flag=True, help="Cancel the lines in flight, write what has ended, and stop."
)
@click.option(
    "--price",
    metavar="IN,OUT[,CACHED]",
    callback=_read_price,
    help="Prices per million tokens, for the final sum.",
)
@click.option(
    "--summary",
    "summary_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the final numbers to this file, as an OpenAI Batch object.",
)
@click.option(
    "--progress",
    type=click.Choice(MODES),
    default="auto",
    show_default=True,
    help="What is shown on standard error.",
)
@click.option("--overwrite", is_flag=True, help="Begin anew; former output files are replaced.")
@click.pass_context
def batch(
    context: click.Context,
    /,
    config: Path | None,
    input: str,  # noqa: A002 - the argument's name
    output: str | None,
    errors: str | None,
    topic: str | None,
    **given: Any,
) -> int:
    """Run an OpenAI Batch file: one chat completion per line.

    \b
    streamworker batch requests.jsonl
    streamworker batch requests.jsonl -o answers.jsonl --price 0.15,0.60
    zcat requests.jsonl.gz | streamworker batch - -o answers.jsonl --batch-id nightly-2030-01-31

    It is safe to run again: the same command continues where it was, also after kill -9, and no line is submitted
    twice.

    Ctrl-C submits nothing more and waits for the lines in flight; a second one cancels them. SIGTERM leaves them
    running: the next start collects them.

    Exit codes: 0 every line is in OUTPUT; 1 finished, and some lines are in ERRORS; 2 bad usage, configuration or
    input; 3 not finished, run it again; 130 interrupted twice.
    """
    settings = settings_of(context, config)
    quietly()
    topics = settings.topics
    jobs_topic = topic or topics.batch or topics.jobs[0]
    if jobs_topic not in topics.jobs:
        raise click.UsageError(f"--topic {jobs_topic} is not one of topics.jobs: {', '.join(topics.jobs)}")
    paths = _paths(input, output, errors)
    options = _options(jobs_topic, merges_deltas=settings.batch.merged_deltas, given=given)
    command = _Batch(settings, options, paths, given)
    return run_async(command.run())


class _Paths:
    """Input and outputs; None is standard input or standard output."""

    def __init__(self, source: Path | None, output: Path | None, errors: Path | None) -> None:
        self.source, self.output, self.errors = source, output, errors


def _paths(source: str, output: str | None, errors: str | None) -> _Paths:
    source_path = None if source == "-" else Path(source)
    if output is None:
        output_path = None if source_path is None else _with_infix(source_path, ".out")
    else:
        output_path = None if output == "-" else Path(output)
    if errors is None:
        errors_path = None if output_path is None else _with_infix(output_path, ".errors")
    else:
        errors_path = None if errors == "-" else Path(errors)
    outputs = {os.path.realpath(path) for path in (output_path, errors_path) if path is not None}
    if source_path is not None and os.path.realpath(source_path) in outputs:
        raise click.UsageError(f"{source_path} is INPUT: name another file for the output")
    return _Paths(source_path, output_path, errors_path)


def _with_infix(path: Path, infix: str) -> Path:
    """Return the path with an infix before the last suffix of its name, or after a name without one."""
    suffix = "" if path.suffix == ".out" else path.suffix
    return path.with_name(f"{path.name.removesuffix(suffix)}{infix}{suffix}")


def _options(topic: str, *, merges_deltas: bool, given: dict[str, Any]) -> BatchOptions:
    return BatchOptions(
        run=given["run"],
        topic=topic,
        window=given["window"],
        upstream=given["upstream"],
        metadata=given["metadata"],
        on_break=given["on_break"],
        expires_in_s=given["expires_in_s"],
        merges_deltas=merges_deltas,
        skips_invalid=given["skip_invalid"],
        retry_failed=given["retry_failed"],
        max_errors=given["max_errors"],
        changed=given["changed"],
        resubmits_unknown=given["resubmit_unknown"],
        limit=given["limit"],
        sorts=given["sorts"],
        overwrites=given["overwrite"],
        cancels=given["cancels"],
        timeout_s=given["timeout_s"],
    )


class _Batch:
    """One run of the command."""

    def __init__(
        self, settings: Settings, options: BatchOptions, paths: _Paths, given: dict[str, Any]
    ) -> None:
        self._settings = settings
        self._options = options
        self._paths = paths
        self._given = given
        self._interrupts = 0
        self._is_terminated = False
        self._started = time.monotonic()

    async def run(self) -> int:
        """Return the exit code."""
        with ExitStack() as stack:
            async with shown(self._given["progress"]) as progress:
                work = asyncio.ensure_future(self._run(stack, progress))
                self._handle_signals(work, progress)
                try:
                    return await work
                except asyncio.CancelledError:
                    if not (self._interrupts or self._is_terminated):
                        raise
                    has_begun = progress.engine is not None and progress.engine.has_begun
                    progress.note(
                        "interrupted; " + ("run the same command again" if has_begun else "nothing was sent")
                    )
                    return RUN_AGAIN if self._is_terminated else INTERRUPTED
                except BatchError as error:
                    progress.note(f"error: {error}")
                    return INTERRUPTED if self._interrupts > 1 else error.exit_code
                except KafkaError as error:
                    hint = "; run the same command again" if isinstance(error, KafkaUnavailable) else ""
                    progress.note(f"error: {error}{hint}")
                    is_sent = progress.engine is not None and progress.engine.has_worked
                    return RUN_AGAIN if is_sent or isinstance(error, KafkaUnavailable) else REFUSED
                finally:
                    self._release_signals()

    async def _run(self, stack: ExitStack, progress: Shown) -> int:
        source = await self._open_input(stack, progress)
        output = LocalOutput(self._paths.output, self._paths.errors)
        output.lock()
        try:
            store = self._store(is_resumable=output.is_resumable)
            engine = Engine(self._settings, self._options, source, output, store, note=progress.note)
            progress.engine = engine
            if self._given["dry_run"]:
                return await self._dry_run(engine)
            try:
                outcome = await engine.run()
            except BatchError:
                self._write_summary(engine, "in_progress")
                raise
        finally:
            await output.close()
        return self._report(engine, outcome, progress)

    def _store(self, *, is_resumable: bool) -> LocalRunStore | NoRunStore:
        if self._paths.output is None or not is_resumable:
            return NoRunStore()
        return LocalRunStore(sibling(self._paths.output, ".run.json"))

    # Input

    async def _open_input(self, stack: ExitStack, progress: Shown) -> LocalInput:
        if self._paths.source is not None:
            source = LocalInput.open(self._paths.source)
            stack.callback(source.close)
            return source
        if sys.stdin.isatty():
            progress.note("reading lines from the terminal; end them with Ctrl-D")
        spool = tempfile.TemporaryFile(prefix="streamworker-batch-")  # noqa: SIM115 - the caller's stack closes it
        stack.callback(spool.close)
        waited = asyncio.get_running_loop().call_later(3, progress.note, "reading standard input ...")
        try:
            await _in_daemon(lambda: _spool(sys.stdin.buffer, spool))
        except OSError as error:
            raise RunRefused(
                f"standard input cannot be copied to {tempfile.gettempdir()}: {error.strerror}"
            ) from error
        finally:
            waited.cancel()
        return LocalInput(spool, "standard input")

    # Signals

    def _handle_signals(self, work: asyncio.Future[int], progress: Shown) -> None:
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGINT, self._interrupted, work, progress)
        loop.add_signal_handler(signal.SIGTERM, self._terminated, work, progress, "SIGTERM")
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            loop.add_signal_handler(signal.SIGHUP, self._terminated, work, progress, "SIGHUP")

    def _release_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)

    def _interrupted(self, work: asyncio.Future[int], progress: Shown) -> None:
        self._interrupts += 1
        engine = progress.engine
        if engine is None or not engine.is_working:
            work.cancel()
        elif self._interrupts == 1:
            in_flight = engine.counts()[State.SUBMITTED]
            progress.note(f"stopping: {in_flight:,} in flight; Ctrl-C again cancels them")
            engine.stop(Stop.DRAIN, "interrupted")
        elif self._interrupts == 2:
            progress.note("cancelling what is in flight")
            engine.stop(Stop.CANCEL, "interrupted twice")
        else:
            engine.stop(Stop.NOW, "interrupted")

    def _terminated(self, work: asyncio.Future[int], progress: Shown, name: str) -> None:
        engine = progress.engine
        if engine is None or not engine.is_working:
            self._is_terminated = True
            work.cancel()
            return
        progress.note(f"{name}: what is in flight goes on, and the next start collects it")
        engine.stop(Stop.NOW, name)

    # Ends

    async def _dry_run(self, engine: Engine) -> int:
        await engine.prepare()
        counts = engine.counts()
        models = ", ".join(f"{count:,} {model}" for model, count in engine.models.items())
        lines = "1 line" if engine.lines == 1 else f"{engine.lines:,} lines"
        click.echo(f"{lines}: {models or 'none is valid'}")
        faulty = f", {counts[State.FAULTY]:,} not valid" if counts[State.FAULTY] else ""
        click.echo(
            f"{counts[State.COMPLETED]:,} completed, {counts[State.FAILED]:,} failed, {counts[State.PENDING]:,} to run or to "
            f"collect{faulty}; nothing was sent"
        )
        return FINISHED

    def _report(self, engine: Engine, outcome: Outcome, progress: Shown) -> int:
        seconds = duration(time.monotonic() - self._started)
        progress.note(ending_text(outcome.total, engine.accounts, seconds))
        for line in engine.accounts.describe(self._given["price"]):
            progress.note(line)
        for name in outcome.files:
            progress.note(f"  {name}")
        if outcome.failed and self._paths.errors is not None:
            progress.note(RETRY_TEXT)
        self._write_summary(engine, "completed")
        return WITH_ERRORS if outcome.failed else FINISHED

    def _write_summary(self, engine: Engine, status: str) -> None:
        path: Path | None = self._given["summary_file"]
        if path is None or not engine.has_begun:
            return
        now = time.time_ns() // 1_000_000
        record = engine.record
        text = json.dumps(
            summary(
                run=engine.run_name,
                status=status,
                source=str(self._paths.source or "-"),
                output=str(self._paths.output or "-"),
                errors=str(self._paths.errors or "-"),
                created=record.created if record else now,
                expires=record.expires if record else None,
                ended=now,
                total=engine.lines,
                accounts=engine.accounts,
                models=engine.models,
                metadata=self._options.metadata,
                price=self._given["price"],
            ),
            indent=1,
        )
        try:
            path.write_text(text + "\n", "utf-8")
        except OSError as error:
            click.echo(f"error: --summary {path} cannot be written: {error.strerror}", err=True)


async def _in_daemon(work: Callable[[], None]) -> None:
    """Run a function in a thread that does not keep the process alive: reading a terminal cannot be interrupted."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: BaseException | None) -> None:
        if not done.done():
            done.set_result(None) if error is None else done.set_exception(error)

    def run() -> None:
        error: BaseException | None = None
        try:
            work()
        except BaseException as raised:  # noqa: BLE001 - it is raised where `done` is awaited
            error = raised
        with suppress(RuntimeError):  # the loop is closed: the command was interrupted
            loop.call_soon_threadsafe(settle, error)

    threading.Thread(target=run, daemon=True).start()
    await done


def _spool(source: IO[bytes], spool: IO[bytes]) -> None:
    try:
        descriptor = source.fileno()
    except OSError:
        shutil.copyfileobj(source, spool, _CHUNK)
    else:  # without the buffer's lock, which a thread that waits for input would keep at the end of the process
        while chunk := os.read(descriptor, _CHUNK):
            spool.write(chunk)
    spool.flush()
    os.fsync(spool.fileno())
