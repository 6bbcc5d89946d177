"""A broker for the demo and for quick tests: the noida-db binary of the `demo` extra, with its Kafka listener only."""

from __future__ import annotations

import shutil
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Final, Self

from streamworker.demo.child import Child, accepts, free_port

_START_S: Final = 20
_STOP_S: Final = 5


class EmbeddedBroker:
    """One broker on this machine, with its data in a temporary directory. Its methods block.

    noida-db 0.2.3 differs from Apache Kafka: a group whose leader dies without leaving never recovers, open
    transactions are never aborted, commit metadata has no limit, and a metadata request creates its topics. Tests of
    these cases need Apache Kafka.
    """

    def __init__(self, host: str = "127.0.0.1", port: int | None = None) -> None:
        self._host = host
        self._port = port or free_port(host)
        self._directory: Path | None = None
        self._child: Child | None = None

    @property
    def bootstrap(self) -> str:
        """Address of the broker, host:port."""
        return f"{self._host}:{self._port}"

    def start(self) -> None:
        """Start, and wait until it accepts connections."""
        binary = find_binary()
        self._directory = Path(tempfile.mkdtemp(prefix="streamworker-broker-"))
        data = self._directory / "data"
        command = [str(binary), "start", "--only", "kafka", "--kafka-port", str(self._port)]
        command += ["--host", self._host, "--data-dir", str(data)]
        # Its output goes to a file: on older systems the dynamic linker prints a harmless symbol warning.
        self._child = Child(command, self._directory / "log")
        try:
            self._child.start(lambda _: accepts(self._port, self._host), _START_S)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop, and delete all data."""
        if self._child is not None:
            self._child.terminate(_STOP_S)
            self._child = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def find_binary() -> Path:
    """Return the path of the installed program. Raises RuntimeError with the command that installs it."""
    try:
        binary = Path(str(files("noida_db").joinpath("noida-db")))
    except ModuleNotFoundError as error:
        raise _missing() from error
    if not binary.is_file():
        raise _missing()
    binary.chmod(0o755)  # wheels are unpacked without the bit
    return binary


def _missing() -> RuntimeError:
    return RuntimeError("the embedded broker needs the demo extra: pip install 'streamworker[demo]'")
