"""Apache Kafka: downloaded once with Maven, then one KRaft node per test session."""

import fcntl
import hashlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

from streamworker.demo.child import Child, accepts, free_ports
from tests.brokers.requirement import need
from tests.brokers.security import Credentials, format_arguments, listener_properties, make_credentials

POM = Path(__file__).with_name("kafka-pom.xml")
EXTERNAL = os.environ.get("STREAMWORKER_TEST_KAFKA")
NEEDS = "Apache Kafka needs {}; or set STREAMWORKER_TEST_KAFKA=host:port"

CLUSTER_ID = "c3RyZWFtd29ya2VyLXRlcw"

FETCH_S = 600
START_S = 60
STOP_S = 30

PROPERTIES = """\
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller_port}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port},\
SASL://127.0.0.1:{sasl_port},MTLS://127.0.0.1:{mtls_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port},SASL://127.0.0.1:{sasl_port},MTLS://127.0.0.1:{mtls_port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_SSL,MTLS:SSL
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
# After a kill the controller accepts the broker again when its old session has expired; the default is 9 s.
broker.session.timeout.ms=2500
broker.heartbeat.interval.ms=500
log.segment.delete.delay.ms=1000
# Otherwise an idle controller writes a record twice a second.
metadata.max.idle.interval.ms=0
offsets.topic.replication.factor=1
offsets.topic.num.partitions=8
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=8
transaction.abort.timed.out.transaction.cleanup.interval.ms=200
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=1
"""


class ApacheKafka:
    """One broker with blocking methods. After a stop, kill or pause it returns on its port with its data."""

    def __init__(self, make_node: Callable[[Path, Sequence[str]], Child] | None = None) -> None:
        self._make_node = make_node or prepared_node
        self.port = self.sasl_port = self.mtls_port = 0
        self._credentials: Credentials | None = None
        self._directory: Path | None = None
        self._child: Child | None = None
        self._paused = False

    @property
    def bootstrap(self) -> str:
        return EXTERNAL or f"127.0.0.1:{self.port}"

    @property
    def credentials(self) -> Credentials:
        """The credentials for the secured listeners. Skips the test on an external broker."""
        if self._credentials is None:
            need("STREAMWORKER_TEST_KAFKA names a broker whose users the tests do not know")
        return self._credentials

    def start(self) -> None:
        """Start the broker: the first time on a free port without data, later on the same port with its data."""
        if EXTERNAL:
            return
        if self._child is None:
            self._child = self._prepared()
        # The port accepts connections before the node accepts requests, so wait for its log line.
        self._child.start(lambda log: b"Kafka Server started" in log and accepts(self.port), START_S)

    def _prepared(self) -> Child:
        self._directory = Path(tempfile.mkdtemp(prefix="streamworker-kafka-"))
        self._credentials = make_credentials(self._directory, secrets.token_hex(12))
        self.port, self.sasl_port, self.mtls_port, controller_port = free_ports(4)
        properties = self._directory / "server.properties"
        ports = {"port": self.port, "sasl_port": self.sasl_port, "mtls_port": self.mtls_port}
        text = PROPERTIES.format(**ports, controller_port=controller_port, data=self._directory / "data")
        properties.write_text(text + listener_properties(self._credentials), "ascii")
        return self._make_node(properties, format_arguments(self._credentials))

    def stop(self) -> None:
        """Stop the broker at the end of the session, without a clean shutdown: its data is not needed."""
        if self._child is not None:
            self._child.kill()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._child = self._directory = None

    def kill(self) -> None:
        """Kill the broker with SIGKILL."""
        self._own().kill()
        self._paused = False

    def restart(self) -> None:
        """Shut the broker down cleanly if it runs, and start it again."""
        self.shut_down()
        self.start()

    def shut_down(self) -> None:
        """Shut the broker down cleanly if it runs."""
        self.resume()
        self._own().terminate(STOP_S)

    def pause(self) -> None:
        """Stop the process with SIGSTOP: connections stay open, and requests get no response."""
        self._own().pause()
        self._paused = True

    def resume(self) -> None:
        self._own().send_signal(signal.SIGCONT)
        self._paused = False

    def heal(self) -> None:
        """Restore a running broker after a test that failed."""
        if self._child is None:
            return
        if self._paused:
            self.resume()
        if not self._child.running:
            self.start()

    def _own(self) -> Child:
        if self._child is None:
            need(
                "STREAMWORKER_TEST_KAFKA names a broker that the tests must not stop"
                if EXTERNAL
                else "not started"
            )
        return self._child


def prepared_node(properties: Path, arguments: Sequence[str] = ()) -> Child:
    """Format the storage of a node that `properties` describe; return its process, which is not started."""
    return _node([*_java(), f"-XX:SharedArchiveFile={archived()}"], properties, arguments)


def _java() -> list[str]:
    return [
        shutil.which("java") or "java",
        "-Xmx512m",
        "-XX:+UseSerialGC",
        "-XX:TieredStopAtLevel=1",  # the broker does not run long enough for the second compiler to pay off
        "-Dorg.apache.logging.log4j.level=INFO",
        "-cp",
        f"{fetched()}/*",
    ]


def _node(java: Sequence[str], properties: Path, arguments: Sequence[str]) -> Child:
    format_ = ["kafka.tools.StorageTool", "format", "--cluster-id", CLUSTER_ID, "--config", str(properties)]
    formatted = subprocess.run(
        [*java, *format_, *arguments],
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert formatted.returncode == 0, formatted.stdout + formatted.stderr
    return Child([*java, "kafka.Kafka", str(properties)], properties.with_name("log"))


@cache
def archived() -> Path:
    """Return the archive of the broker's classes, with which it starts in half of the CPU time.

    The first call on a machine starts a broker that writes the archive when it stops. A Java other than the one that
    wrote it would ignore the archive, so its name has the path and the time of the Java that it is for.
    """
    libraries = fetched()
    java = Path(shutil.which("java") or "java").resolve()
    version = hashlib.sha256(f"{java} {java.stat().st_mtime_ns}".encode()).hexdigest()[:8]
    archive = Path(f"{libraries}-{version}.jsa")
    with _locked(archive):
        if not archive.exists():
            _archive(archive)
    return archive


def _archive(archive: Path) -> None:
    """Start a broker that writes its classes to an archive when it stops."""
    fresh = archive.with_suffix(f".{os.getpid()}")
    kafka = ApacheKafka(partial(_node, [*_java(), f"-XX:ArchiveClassesAtExit={fresh}"]))
    try:
        kafka.start()
        kafka.shut_down()
        fresh.rename(archive)  # an incomplete archive never has this name
    finally:
        kafka.stop()
        fresh.unlink(missing_ok=True)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold a lock for a cached file: tests may run in several processes, and one of them makes it."""
    with Path(f"{file}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def fetched() -> Path:
    """Return the directory with the broker's jars, from the cache or from Maven. Skips if there is none."""
    if shutil.which("java") is None:
        need(NEEDS.format("a JDK (java) on the PATH"))
    libraries = cached_libraries()
    if not libraries.is_dir():
        libraries.parent.mkdir(parents=True, exist_ok=True)
        with _locked(libraries):
            if not libraries.is_dir():
                _fetch(libraries)
    return libraries


def can_run() -> bool:
    """Whether tests on Apache Kafka run on this machine."""
    if EXTERNAL:
        return True
    return shutil.which("java") is not None and (
        cached_libraries().is_dir() or shutil.which("mvn") is not None
    )


def cached_libraries() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    pom = POM.read_text("utf-8")
    version = re.findall(r"<artifactId>kafka_.*?<version>([^<]+)<", pom, re.DOTALL)[0]
    # A changed pom may have other jars for the same version of Kafka.
    return root / "streamworker-tests" / f"kafka-{version}-{hashlib.sha256(pom.encode()).hexdigest()[:8]}"


def _fetch(libraries: Path) -> None:
    if (maven := shutil.which("mvn")) is None:
        need(NEEDS.format("Maven (mvn) on the PATH, once"))
    with tempfile.TemporaryDirectory(dir=libraries.parent) as fresh:
        jars = Path(fresh) / "jars"
        goal = ["dependency:copy-dependencies", f"-DoutputDirectory={jars}"]
        try:
            done = subprocess.run(
                [maven, "-q", "-B", "-f", str(POM), *goal],
                cwd=fresh,
                capture_output=True,
                text=True,
                timeout=FETCH_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            need(NEEDS.format(f"its jars from Maven within {FETCH_S} s"))
        if done.returncode or not jars.is_dir():
            need(NEEDS.format(f"its jars, and Maven failed: {(done.stdout + done.stderr)[-2000:]}"))
        jars.rename(libraries)  # an incomplete download never has this name
