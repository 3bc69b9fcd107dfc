"""etcd, kube-apiserver and kubectl: built once from Go modules, kept in a cache outside the tree.

The folder `tools` pins the modules; what is built are their own main packages. Another program of
theirs (kubelet, kube-scheduler, …) is a line in `_PROGRAMS` and a `tool` line in `tools/go.mod`.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from dev.stack import keeper, lifeline
from dev.stack.errors import StackError
from dev.stack.jars import only_one
from dev.stack.packages import cache_folder

TOOLS: Final = Path(__file__).with_name("tools")
_PROGRAMS: Final = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
}
# Unset, these are v0.0.0: clients that look at the server's version then go wrong.
_STAMPED: Final = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
_LOG_LINES: Final = 20


class NoGoError(StackError):
    """This machine has no Go, or too old a one, so there can be no Kubernetes."""


@dataclass(frozen=True, slots=True)
class Binaries:
    """The programs, in one folder of the cache."""

    folder: Path

    @property
    def etcd(self) -> Path:
        return self.folder / "etcd"

    @property
    def kube_apiserver(self) -> Path:
        return self.folder / "kube-apiserver"

    @property
    def kubectl(self) -> Path:
        return self.folder / "kubectl"


@dataclass(frozen=True, slots=True)
class _Go:
    program: str
    version: str
    platform: str


@cache
def binaries() -> Binaries:
    """The programs, built first if need be (minutes), with progress on stderr.

    Safe against an interruption, after which Go goes on from what it had compiled, and against
    another process that does the same. Raises NoGoError without a Go that is new enough, StackError
    if the build fails.
    """
    go = _go()
    folder = cache_folder() / "cluster" / f"kubernetes-{kubernetes_version()}-{_key(go)}"
    if not folder.exists():
        _say_if_another_builds(folder)
        with only_one(folder):
            if not folder.exists():
                part = folder.with_name(folder.name + ".part")
                shutil.rmtree(part, ignore_errors=True)
                (part / "work").mkdir(parents=True)
                _build(go, part)
                (part / "bin").rename(folder)
                shutil.rmtree(part)
    return Binaries(folder)


def require_go() -> None:
    """Raises NoGoError without a Go that is new enough; builds nothing."""
    _go()


def kubernetes_version() -> str:
    """The version that go.mod names, such as "v1.34.4"."""
    return _in_go_mod(r"k8s\.io/kubernetes (v\S+)")


def _in_go_mod(pattern: str) -> str:
    found = re.search(rf"^\s*{pattern}", (TOOLS / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise StackError(f"{TOOLS / 'go.mod'} has no line like {pattern}")
    return found[1]


@cache
def _go() -> _Go:
    needed = _in_go_mod(r"go (\d+\.\d+)")
    advice = (
        f"Kubernetes is built from its Go modules: install Go {needed} or newer, "
        "so that `go` is found on PATH"
    )
    if (program := shutil.which("go")) is None:
        raise NoGoError(f"no Go on this machine; {advice}")
    # In the module's folder, where Go may choose, and get, a newer toolchain by itself.
    asked = subprocess.run(
        [program, "env", "-json", "GOVERSION", "GOOS", "GOARCH"],
        cwd=TOOLS,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        said = " ".join(asked.stderr.split())
        raise NoGoError(f"{program} does not do: {said}; {advice}")
    facts = json.loads(asked.stdout)
    version: str = facts["GOVERSION"]
    if _numbers(version) < _numbers(needed):
        raise NoGoError(f"{program} is {version}: too old; {advice}")
    return _Go(program, version, f"{facts['GOOS']}/{facts['GOARCH']}")


def _numbers(version: str) -> tuple[int, ...]:
    """The release that a text such as "go1.26.8" or "1.25" names, as far as its minor number."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _environment() -> dict[str, str]:
    # Plain static programs, and nothing of a workspace that this tree may lie in.
    return {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}


def _arguments() -> list[str]:
    version = kubernetes_version()
    major, minor, _patch = version.removeprefix("v").split(".", 2)
    facts = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
    stamps = [
        f"-X {package}.{name}={value}" for package in _STAMPED for name, value in facts.items()
    ]
    return ["-trimpath", "-ldflags", " ".join(["-s", "-w", *stamps])]


def _key(go: _Go) -> str:
    """What two builds that may differ in their programs differ in."""
    sources = [path for path in sorted(TOOLS.rglob("*")) if path.suffix in (".mod", ".sum", ".go")]
    facts = [go.version, go.platform, *_arguments(), *_PROGRAMS.values()]
    facts += [f"{path.relative_to(TOOLS)}\n{path.read_text()}" for path in sources]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12]


def _say_if_another_builds(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(folder.name + ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"{_title()}: another process builds it; waiting for that")


def _title() -> str:
    return f"Kubernetes {kubernetes_version()}"


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


def _build(go: _Go, part: Path) -> None:
    """Leaves the programs in `part/bin`."""
    packages = list(_PROGRAMS.values())
    _say(
        f"{_title()}: building {', '.join(_PROGRAMS)} with {go.version}, once; about ten minutes "
        "of CPU where Go has compiled nothing of it yet"
    )
    progress = _Progress()
    said = _run(go, ["list", "-deps", *packages], part, progress, "downloading modules")
    # One line a package, and one a module that had to be downloaded.
    total = sum(not line.startswith("go: ") for line in said)
    _run(
        go,
        ["build", "-v", *_arguments(), "-o", f"{part / 'bin'}{os.sep}", *packages],
        part,
        progress,
        f"compiling, {{lines}} of at most {total} packages",
    )
    for name, package in _PROGRAMS.items():
        # Go names a program by the last part of its package's path that is no version.
        made = re.sub(r"/v\d+$", "", package).rpartition("/")[2]
        (part / "bin" / made).rename(part / "bin" / name)
    progress.end(f"{_title()}: built, in {{seconds:.0f}} s")


def _run(go: _Go, arguments: list[str], part: Path, progress: "_Progress", doing: str) -> list[str]:
    """Runs `go` to its end and returns the lines of its output. Raises StackError if it fails."""
    log = part / "log"
    with log.open("w") as output:
        child = subprocess.Popen(
            [go.program, *arguments],
            cwd=TOOLS,
            # What it has to throw away goes away with the rest, however it ends.
            env={**_environment(), "GOTMPDIR": str(part / "work")},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    # A session that is killed must not leave minutes of compiling behind.
    if (identity := lifeline.identity(child.pid)) is not None:
        keeper.add(child.pid, identity, signal.SIGKILL)
    try:
        while not _ended(child):
            lines = len(log.read_text().splitlines())
            progress.show(f"{_title()}: {doing.format(lines=lines)}, {{seconds:.0f}} s")
    finally:
        if child.poll() is None:
            lifeline.destroy(child.pid)
            child.wait()
        keeper.remove(child.pid)
    said = log.read_text().splitlines()
    if child.returncode != 0:
        progress.clear()
        tail = "\n".join(f"    {line}" for line in said[-_LOG_LINES:])
        raise StackError(
            f"`go {arguments[0]}` failed (exit code {child.returncode}); check the network and "
            "Go's module proxy (GOPROXY), then run `python -m dev.cluster build` again, which "
            f"goes on from here. Its last words, all of them in {log}:\n{tail}"
        )
    return said


def _ended(child: subprocess.Popen[bytes]) -> bool:
    """Whether it ended, now or in the next half a second."""
    try:
        child.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        return False
    return True


class _Progress:
    """How far the build is: one line that changes on a terminal, else a line every 15 s."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown = self._began

    def show(self, line: str) -> None:
        terminal = sys.stderr.isatty()
        now = time.monotonic()
        if now - self._shown < (0.2 if terminal else 15.0):
            return
        self._shown = now
        text = line.format(seconds=now - self._began)
        sys.stderr.write(f"\r\x1b[K{text}" if terminal else f"{text}\n")
        sys.stderr.flush()

    def clear(self) -> None:
        if sys.stderr.isatty():
            sys.stderr.write("\r\x1b[K")

    def end(self, line: str) -> None:
        self.clear()
        _say(line.format(seconds=time.monotonic() - self._began))
