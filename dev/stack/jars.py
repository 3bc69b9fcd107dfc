"""Kafka's jars, exactly as listed in kafka.lock. jgo downloads them into a cache folder."""

import hashlib
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from dev.stack.errors import StackError
from dev.stack.locks import exclusive
from dev.stack.packages import cache_folder

LOCK_FILE = Path(__file__).with_name("kafka.lock")
# Binds slf4j to Log4j 2, in the version that Kafka has. Without it nothing is logged.
_LOGGING = "org.apache.logging.log4j:log4j-slf4j-impl"
_ADVICE = (
    "check the network and jgo's repositories (jgo.conf), then run again; "
    "complete files are not downloaded again"
)


@dataclass(frozen=True, slots=True)
class Jar:
    """One line of the lock: Maven coordinates, size in bytes, SHA-256."""

    coordinates: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        _group, artifact, version = self.coordinates.split(":")
        return f"{artifact}-{version}.jar"

    def matches(self, path: Path) -> bool:
        return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == self.sha256


def locked() -> list[Jar]:
    """Return the jars of the lock file, Kafka itself first."""
    lines = [line.split() for line in LOCK_FILE.read_text().splitlines()]
    return [Jar(line[0], int(line[1]), line[2]) for line in lines if line and line[0] != "#"]


def kafka_version() -> str:
    """Return the locked version, for example "4.1.2"."""
    return locked()[0].coordinates.rpartition(":")[2]


def kafka_folder() -> Path:
    """Return the folder of Kafka's jars. The first call downloads them, with progress on stderr.

    After an interruption, only incomplete files are downloaded again. Another process that calls
    this waits. Raises StackError if a jar cannot be downloaded or differs from the lock.
    """
    digest = hashlib.sha256(LOCK_FILE.read_bytes()).hexdigest()[:12]
    folder = cache_folder() / f"kafka-{kafka_version()}-{digest}"
    if folder.exists():
        return folder
    with exclusive(folder):
        if not folder.exists():
            part = folder.with_name(folder.name + ".part")
            part.mkdir(exist_ok=True)
            _download(locked(), part)
            part.rename(folder)
    return folder


def resolve(version: str) -> list[Jar]:
    """Download a version of Kafka with its dependencies, and return them for a new lock."""
    from jgo.maven import MavenContext  # noqa: PLC0415 - slow to import, needed here only
    from jgo.parse import Coordinate  # noqa: PLC0415

    with exclusive(cache_folder() / "resolved"):
        repository = cache_folder() / "resolved"
        context = MavenContext(repo_cache=repository, remote_repos=_repositories())

        def closure(*coordinates: str) -> list[str]:
            # Raw, because otherwise the parent of log4j-slf4j-impl, which manages the versions of
            # its own build, downgrades kafka-clients to 3.8.
            wanted = [
                context.create_dependency(
                    replace(Coordinate.parse(each), scope="compile", raw=True)
                )
                for each in coordinates
            ]
            inputs, others = context.resolver.resolve(wanted)
            found = [each for each in (*inputs, *others) if each.scope in ("compile", "runtime")]
            return [f"{each.groupId}:{each.artifactId}:{each.version}" for each in found]

        kafka = f"org.apache.kafka:kafka_2.13:{version}"
        log4j = next(each for each in closure(kafka) if ":log4j-api:" in each).rpartition(":")[2]
        jars = []
        for coordinates in closure(kafka, f"{_LOGGING}:{log4j}"):
            group, artifact, its_version = coordinates.split(":")
            content = (
                context.project(group, artifact).at_version(its_version).artifact().resolve()
            ).read_bytes()
            jars.append(Jar(coordinates, len(content), hashlib.sha256(content).hexdigest()))
        shutil.rmtree(repository)
    return [jars[0], *sorted(jars[1:], key=lambda jar: jar.coordinates)]


def _download(jars: list[Jar], part: Path) -> None:
    missing = [jar for jar in jars if not jar.matches(part / jar.file_name)]
    progress = _Progress(sum(jar.size for jar in missing), len(missing))
    pool = ThreadPoolExecutor(max_workers=6, thread_name_prefix="kafka-download")
    try:
        repository = part / "repository"
        shutil.rmtree(repository, ignore_errors=True)
        fetch = _fetcher(repository, progress)
        running = {pool.submit(fetch, jar, part): jar for jar in missing}
        pending: set[Future[None]] = set(running)
        while pending:
            done, pending = wait(pending, timeout=0.5)
            for each in done:
                each.result()
            progress.show(len(pending))
        shutil.rmtree(repository, ignore_errors=True)
    finally:
        pool.shutdown(cancel_futures=True)
        progress.end()


def _fetcher(repository: Path, progress: "_Progress") -> Callable[[Jar, Path], None]:
    from jgo.maven import MavenContext, PythonResolver  # noqa: PLC0415 - slow to import, needed once

    context = MavenContext(
        resolver=PythonResolver(progress_callback=progress.of),
        repo_cache=repository,
        remote_repos=_repositories(),
        timeout=30,
    )

    def fetch(jar: Jar, folder: Path) -> None:
        group, artifact, version = jar.coordinates.split(":")
        try:
            found = context.project(group, artifact).at_version(version).artifact().resolve()
        except (OSError, RuntimeError) as error:  # requests' errors are OSErrors
            raise StackError(f"cannot download {jar.coordinates}: {error}; {_ADVICE}") from error
        if not jar.matches(found):
            raise StackError(
                f"{jar.coordinates} differs from {LOCK_FILE.name} in its size or SHA-256 "
                f"({found.stat().st_size} bytes, expected {jar.size}); {_ADVICE}"
            )
        found.replace(folder / jar.file_name)

    return fetch


def _repositories() -> dict[str, str]:
    """Return Maven Central and the repositories of jgo.conf, which can replace `central`."""
    from jgo.config import GlobalSettings  # noqa: PLC0415 - slow to import, needed once
    from jgo.constants import MAVEN_CENTRAL_URL  # noqa: PLC0415

    return {"central": MAVEN_CENTRAL_URL, **GlobalSettings.load().repositories}


@dataclass(slots=True)
class _Progress:
    """Progress of the download: one changing line on a terminal, otherwise a line every 5 s."""

    total: int
    files: int
    received: int = 0
    began: float = field(default_factory=time.monotonic)
    shown: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, _name: str, _size: int) -> AbstractContextManager[Callable[[int], None]]:
        @contextmanager
        def receiving() -> Iterator[Callable[[int], None]]:
            yield self.add

        return receiving()

    def add(self, count: int) -> None:
        with self.lock:
            self.received += count

    def show(self, files_left: int) -> None:
        terminal = sys.stderr.isatty()
        now = time.monotonic()
        if files_left and now - self.shown < (0.2 if terminal else 5.0):
            return
        self.shown = now
        line = (
            f"Kafka {kafka_version()}: {self.received / 1e6:.0f} of {self.total / 1e6:.0f} MB, "
            f"{self.files - files_left} of {self.files} files, {now - self.began:.0f} s"
        )
        sys.stderr.write(f"\r{line}" if terminal else f"{line}\n")
        sys.stderr.flush()

    def end(self) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\n")
