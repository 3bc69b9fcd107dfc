"""Programs built from Go modules, in a cache whose key covers everything that can change them."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from dev.progress import Progress, run, say
from dev.stack.errors import StackError
from dev.stack.locks import exclusive
from dev.stack.packages import cache_folder

_LOG_LINES: Final = 20


class NoGoError(StackError):
    """This machine has no Go that is new enough to build Kubernetes."""


@dataclass(frozen=True, slots=True)
class Go:
    program: str
    version: str
    platform: str


@dataclass(frozen=True, slots=True, eq=False)
class Toolset:
    """Programs of one go.mod, with one set of versions."""

    title: str
    """In lower case also the name on the command line and in the cache."""
    folder: Path
    module: str
    """The module whose version is the version of the toolset."""
    programs: Mapping[str, str]
    """The Go package of each program."""
    stamps: Callable[[], Mapping[str, str]]
    """Variables that the linker sets. Without them the programs report invented versions, which
    misleads clients.
    """
    cost: str
    """The CPU time of a first build, in words."""

    @property
    def version(self) -> str:
        return self.in_go_mod(rf"{re.escape(self.module)} (v\S+)")

    @property
    def named(self) -> str:
        return f"{self.title} {self.version}"

    def in_go_mod(self, pattern: str) -> str:
        path = self.folder / "go.mod"
        found = re.search(rf"^\s*{pattern}", path.read_text(), re.MULTILINE)
        if found is None:
            raise StackError(f"{path} has no line that matches {pattern}")
        return found[1]

    def arguments(self) -> list[str]:
        stamps = [f"-X {name}={value}" for name, value in self.stamps().items()]
        return ["-trimpath", "-ldflags", " ".join(["-s", "-w", *stamps])]

    def key(self, go: Go) -> str:
        """Return a digest of everything that can change the built programs."""
        sources = [
            path
            for path in sorted(self.folder.rglob("*"))
            if path.suffix in (".mod", ".sum", ".go") and self._owns(path)
        ]
        facts = [go.version, go.platform, *self.arguments(), *self.programs.values()]
        facts += [f"{path.relative_to(self.folder)}\n{path.read_text()}" for path in sources]
        return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12]

    def _owns(self, path: Path) -> bool:
        """Return whether a file belongs to this module and not to a nested one."""
        nearest = next(folder for folder in path.parents if (folder / "go.mod").exists())
        return nearest == self.folder


def built(tools: Toolset) -> Path:
    """Return the folder of a toolset's programs. Builds them if needed, with progress on stderr.

    Raises NoGoError without a Go that is new enough, and StackError if the build fails.
    """
    folder = cache_of(tools)
    if not folder.exists():
        busy = f"{tools.named}: waiting for another process that builds it"
        with exclusive(folder, waiting=lambda: say(busy)):
            if not folder.exists():
                part = folder.with_name(folder.name + ".part")
                shutil.rmtree(part, ignore_errors=True)
                (part / "work").mkdir(parents=True)
                _build(tools, go_for(tools), part)
                (part / "bin").rename(folder)
                shutil.rmtree(part)
    return folder


def cache_of(tools: Toolset) -> Path:
    """Return the folder that a toolset's programs have, or will have. Raises as `go_for`."""
    name = f"{tools.title.lower()}-{tools.version}-{tools.key(go_for(tools))}"
    return cache_folder() / "cluster" / name


@cache
def go_for(tools: Toolset) -> Go:
    """Return this machine's Go. Raises NoGoError without one that is new enough."""
    needed = tools.in_go_mod(r"go (\d+\.\d+)")
    advice = (
        f"{tools.title} is built from its Go modules; install Go {needed} or newer, "
        "with `go` on PATH"
    )
    if (program := shutil.which("go")) is None:
        raise NoGoError(f"no Go on this machine; {advice}")
    # In the module's folder, because its go.mod can make Go download a newer toolchain.
    asked = subprocess.run(
        [program, "env", "-json", "GOVERSION", "GOOS", "GOARCH"],
        cwd=tools.folder,
        env=_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        reason = " ".join(asked.stderr.split())
        raise NoGoError(f"{program} failed: {reason}; {advice}")
    facts = json.loads(asked.stdout)
    version: str = facts["GOVERSION"]
    if _numbers(version) < _numbers(needed):
        raise NoGoError(f"{program} is too old ({version}); {advice}")
    return Go(program, version, f"{facts['GOOS']}/{facts['GOARCH']}")


def _numbers(version: str) -> tuple[int, ...]:
    """Return the major and minor number of a text such as "go1.26.8" or "1.25"."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _environment() -> dict[str, str]:
    # Static programs, independent of a Go workspace that may contain this checkout.
    return {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}


def _build(tools: Toolset, go: Go, part: Path) -> None:
    """Build the programs into `part/bin`."""
    packages = list(tools.programs.values())
    say(
        f"{tools.named}: building {', '.join(tools.programs)} with {go.version}; "
        f"a first build takes {tools.cost} of CPU"
    )
    progress = Progress()
    building = _Building(tools, go, part, progress)
    lines = building.run(["list", "-deps", *packages], "downloading modules")
    # The output has a line per package, and a line per module that had to be downloaded.
    total = sum(not line.startswith("go: ") for line in lines)
    building.run(
        ["build", "-v", *tools.arguments(), "-o", f"{part / 'bin'}{os.sep}", *packages],
        f"compiling, {{lines}} of at most {total} packages",
    )
    for name, package in tools.programs.items():
        # Go names a program after the last part of its package's path, without the version.
        made = re.sub(r"/v\d+$", "", package).rpartition("/")[2]
        (part / "bin" / made).rename(part / "bin" / name)
    progress.end(f"{tools.named}: built in {{seconds}} s")


@dataclass(frozen=True, slots=True)
class _Building:
    tools: Toolset
    go: Go
    part: Path
    progress: Progress

    def run(self, arguments: list[str], step: str) -> list[str]:
        """Run `go` to its end and return the lines of its output. Raises StackError if it fails."""
        log = self.part / "log"

        def show(lines: list[str]) -> None:
            shown = step.replace("{lines}", str(len(lines)))
            self.progress.show(f"{self.tools.named}: {shown}, {{seconds}} s")

        code, output = run(
            [self.go.program, *arguments],
            folder=self.tools.folder,
            # Temporary files are deleted with the folder, even if the build is killed.
            environment={**_environment(), "GOTMPDIR": str(self.part / "work")},
            log=log,
            show=show,
        )
        if code != 0:
            self.progress.clear()
            command = f"python -m dev.cluster build {self.tools.title.lower()}"
            tail = "\n".join(f"    {line}" for line in output[-_LOG_LINES:])
            raise StackError(
                f"`go {arguments[0]}` failed (exit code {code}); check the network and Go's module "
                f"proxy (GOPROXY), then run `{command}` again, which continues from here. "
                f"The end of its output ({log}):\n{tail}"
            )
        return output
