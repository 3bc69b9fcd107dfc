"""The download of Kafka, from a Maven repository on loopback."""

import gc
import hashlib
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dev.stack import jars
from dev.stack.errors import StackError
from dev.stack.packages import cache_folder

# jgo does not close the connection of an answer other than 200.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}:pytest.PytestUnraisableExceptionWarning")
    for text in ("Exception ignored in. <socket", "Exception ignored while finalizing socket")
]

CONTENTS = {"first": b"the first jar", "second": b"the second jar"}


@dataclass
class Repository:
    """A Maven repository with `files` by path. It counts requests by path."""

    files: dict[str, bytes]
    asked: Counter[str] = field(default_factory=Counter)


def path_of(artifact: str) -> str:
    return f"/example/{artifact}/1.0/{artifact}-1.0.jar"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Repository]:
    """A repository with both jars, a lock file with both, and an empty cache."""
    found = Repository({path_of(name): content for name, content in CONTENTS.items()})

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # the name is http.server's
            found.asked[self.path] += 1
            content = found.files.get(self.path)
            self.send_response(404 if content is None else 200)
            self.send_header("Content-Length", str(len(content or b"")))
            self.end_headers()
            self.wfile.write(content or b"")

        def log_message(self, *_arguments: object) -> None:
            """Print nothing."""

    lock = tmp_path / "kafka.lock"
    lines = [
        f"example:{name}:1.0 {len(content)} {hashlib.sha256(content).hexdigest()}\n"
        for name, content in CONTENTS.items()
    ]
    lock.write_text("# a comment\n" + "".join(lines))
    monkeypatch.setattr(jars, "LOCK_FILE", lock)
    monkeypatch.setenv("FLASHSALE_CACHE", str(tmp_path / "cache"))
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        settings = tmp_path / "jgo.conf"
        settings.write_text(
            f"[repositories]\ncentral = http://127.0.0.1:{server.server_address[1]}\n"
        )
        monkeypatch.setenv("JGO_CONFIG_FILE", str(settings))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield found
        server.shutdown()
        thread.join()
    gc.collect()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


WHOLE = {f"{name}-1.0.jar": content for name, content in CONTENTS.items()}


def test_the_jars_are_downloaded_once(
    repository: Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = jars.kafka_folder()
    assert contents(folder) == WHOLE
    asked = repository.asked.copy()
    assert jars.kafka_folder() == folder
    assert repository.asked == asked
    assert "Kafka 1.0: 0 of 0 MB, 2 of 2 files" in capsys.readouterr().err


def test_two_concurrent_callers_download_once(repository: Repository) -> None:
    with ThreadPoolExecutor(2) as pool:
        folders = list(pool.map(lambda _: jars.kafka_folder(), range(2)))
    assert folders[0] == folders[1]
    assert contents(folders[0]) == WHOLE
    assert {path: repository.asked[path] for path in repository.files} == dict.fromkeys(
        repository.files, 1
    )


def test_a_file_that_differs_from_the_lock_is_refused(repository: Repository) -> None:
    repository.files[path_of("second")] = b"something else"
    with pytest.raises(StackError, match=r"example:second:1\.0 differs from kafka.lock"):
        jars.kafka_folder()


def test_after_a_failure_only_missing_files_are_downloaded(repository: Repository) -> None:
    missing = path_of("second")
    content = repository.files.pop(missing)
    with pytest.raises(StackError, match=r"cannot download example:second:1\.0.*run again"):
        jars.kafka_folder()
    assert not [path for path in cache_folder().iterdir() if path.name.endswith(".jar")]
    repository.files[missing] = content
    assert contents(jars.kafka_folder()) == WHOLE
    assert repository.asked[path_of("first")] == 1


def test_a_truncated_jar_is_downloaded_again(repository: Repository) -> None:
    kept = repository.files.pop(path_of("second"))
    with pytest.raises(StackError):
        jars.kafka_folder()
    (part,) = cache_folder().glob("*.part")
    (part / "first-1.0.jar").write_bytes(b"the fir")
    repository.files[path_of("second")] = kept
    assert contents(jars.kafka_folder()) == WHOLE
