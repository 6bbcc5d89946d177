"""Three Apache Kafka nodes, each one broker and controller, that tests kill and restart one by one."""

import shutil
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from streamworker.demo.child import Child, accepts, free_ports
from tests.brokers.apache import EXTERNAL, START_S, STOP_S, prepared_node
from tests.brokers.requirement import need

PROPERTIES = """\
process.roles=broker,controller
node.id={node}
controller.quorum.voters={voters}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{port},CONTROLLER://127.0.0.1:{controller_port}
advertised.listeners=PLAINTEXT://127.0.0.1:{port}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
inter.broker.listener.name=PLAINTEXT
log.dirs={data}
auto.create.topics.enable=false
group.initial.rebalance.delay.ms=0
group.min.session.timeout.ms=1000
broker.session.timeout.ms=3000
broker.heartbeat.interval.ms=500
replica.lag.time.max.ms=5000
default.replication.factor=3
min.insync.replicas=2
offsets.topic.replication.factor=3
offsets.topic.num.partitions=6
transaction.state.log.replication.factor=3
transaction.state.log.min.isr=2
transaction.state.log.num.partitions=6
transaction.abort.timed.out.transaction.cleanup.interval.ms=200
share.coordinator.state.topic.num.partitions=1
"""


class ApacheCluster:
    """Nodes 1 to `size`, with blocking methods. A node that was stopped or killed returns on its port with its data.

    Topics have three replicas by default, two of which must be in sync for a write.
    """

    def __init__(self, size: int = 3) -> None:
        self.size = size
        self._ports: dict[int, int] = {}
        self._nodes: dict[int, Child] = {}
        self._paused: set[int] = set()
        self._directory: Path | None = None

    @property
    def nodes(self) -> list[int]:
        """The ids of all nodes."""
        return list(range(1, self.size + 1))

    @property
    def bootstrap(self) -> str:
        """All nodes, whether they run or not."""
        return ",".join(f"127.0.0.1:{port}" for port in self._ports.values())

    def start(self) -> None:
        """Start all nodes for the first time: none is ready without the others."""
        if EXTERNAL:
            need("STREAMWORKER_TEST_KAFKA names a broker that the tests must not stop")
        self._directory = Path(tempfile.mkdtemp(prefix="streamworker-cluster-"))
        ports = free_ports(2 * self.size)
        controllers = dict(zip(self.nodes, ports[: self.size], strict=True))
        self._ports = dict(zip(self.nodes, ports[self.size :], strict=True))
        for node, port in self._ports.items():
            directory = self._directory / str(node)
            directory.mkdir()
            properties = directory / "server.properties"
            text = PROPERTIES.format(
                node=node,
                voters=",".join(f"{other}@127.0.0.1:{controllers[other]}" for other in self.nodes),
                port=port,
                controller_port=controllers[node],
                data=directory / "data",
            )
            properties.write_text(text, "ascii")
            self._nodes[node] = prepared_node(properties)
        for child in self._nodes.values():
            child.start(lambda _: True, START_S)
        for node in self.nodes:
            self._nodes[node].wait_until(self._is_ready(node), START_S)

    def stop(self) -> None:
        """Kill all nodes and delete their data."""
        for child in self._nodes.values():
            child.kill()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        self._nodes, self._directory = {}, None

    def kill(self, node: int) -> None:
        """Kill a node with SIGKILL."""
        self._nodes[node].kill()
        self._paused.discard(node)

    def return_(self, node: int) -> None:
        """Start a node that was killed."""
        self._nodes[node].start(self._is_ready(node), START_S)

    def restart(self, node: int) -> None:
        """Shut a node down cleanly if it runs, as a rolling restart does, and start it again."""
        self.resume(node)
        self._nodes[node].terminate(STOP_S)
        self.return_(node)

    def pause(self, node: int) -> None:
        """Stop a node with SIGSTOP: its connections stay open, and requests get no response."""
        self._nodes[node].pause()
        self._paused.add(node)

    def resume(self, node: int) -> None:
        """Let a node continue."""
        self._nodes[node].send_signal(signal.SIGCONT)
        self._paused.discard(node)

    def heal(self) -> None:
        """Resume and start every node that a test left paused or dead."""
        for node in list(self._paused):
            self.resume(node)
        for node, child in self._nodes.items():
            if not child.running:
                self.return_(node)

    def _is_ready(self, node: int) -> Callable[[bytes], bool]:
        return lambda log: b"Kafka Server started" in log and accepts(self._ports[node])
