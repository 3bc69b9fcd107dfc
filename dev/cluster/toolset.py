"""Programs built once from Go modules, and kept in a cache by what may make them differ."""

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
    """This machine has no Go, or too old a one, so there can be no Kubernetes."""


@dataclass(frozen=True, slots=True)
class Go:
    program: str
    version: str
    platform: str


@dataclass(frozen=True, slots=True, eq=False)
class Toolset:
    """Programs of one go.mod, whose versions go together."""

    title: str
    """Also what a cache folder and the command line call it, in lower case."""
    folder: Path
    module: str
    """The one whose version is the toolset's."""
    programs: Mapping[str, str]
    """The package of each."""
    stamps: Callable[[], Mapping[str, str]]
    """What is set at the link: unset, versions are made up and clients that look at them go wrong.
    """
    cost: str

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
            raise StackError(f"{path} has no line like {pattern}")
        return found[1]

    def arguments(self) -> list[str]:
        stamps = [f"-X {name}={value}" for name, value in self.stamps().items()]
        return ["-trimpath", "-ldflags", " ".join(["-s", "-w", *stamps])]

    def key(self, go: Go) -> str:
        """What two builds that may differ in their programs differ in."""
        sources = [
            path
            for path in sorted(self.folder.rglob("*"))
            if path.suffix in (".mod", ".sum", ".go") and self._owns(path)
        ]
        facts = [go.version, go.platform, *self.arguments(), *self.programs.values()]
        facts += [f"{path.relative_to(self.folder)}\n{path.read_text()}" for path in sources]
        return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:12]

    def _owns(self, path: Path) -> bool:
        """Whether a file belongs to this module, and not to one in a folder of it."""
        nearest = next(folder for folder in path.parents if (folder / "go.mod").exists())
        return nearest == self.folder


def built(tools: Toolset) -> Path:
    """The folder of a toolset's programs, built first if need be, with progress on stderr.

    Raises NoGoError without a Go that is new enough, StackError if the build fails.
    """
    go = go_for(tools)
    name = f"{tools.title.lower()}-{tools.version}-{tools.key(go)}"
    folder = cache_folder() / "cluster" / name
    if not folder.exists():
        busy = f"{tools.named}: another process builds it; waiting for that"
        with exclusive(folder, waiting=lambda: say(busy)):
            if not folder.exists():
                part = folder.with_name(folder.name + ".part")
                shutil.rmtree(part, ignore_errors=True)
                (part / "work").mkdir(parents=True)
                _build(tools, go, part)
                (part / "bin").rename(folder)
                shutil.rmtree(part)
    return folder


@cache
def go_for(tools: Toolset) -> Go:
    """The machine's Go. Raises NoGoError without one that is new enough; builds nothing."""
    needed = tools.in_go_mod(r"go (\d+\.\d+)")
    advice = (
        f"{tools.title} is built from its Go modules: install Go {needed} or newer, "
        "so that `go` is found on PATH"
    )
    if (program := shutil.which("go")) is None:
        raise NoGoError(f"no Go on this machine; {advice}")
    # In the module's folder, where Go may choose, and get, a newer toolchain by itself.
    asked = subprocess.run(
        [program, "env", "-json", "GOVERSION", "GOOS", "GOARCH"],
        cwd=tools.folder,
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
    return Go(program, version, f"{facts['GOOS']}/{facts['GOARCH']}")


def _numbers(version: str) -> tuple[int, ...]:
    """The release that a text such as "go1.26.8" or "1.25" names, as far as its minor number."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _environment() -> dict[str, str]:
    # Plain static programs, and nothing of a workspace that this tree may lie in.
    return {**os.environ, "CGO_ENABLED": "0", "GOWORK": "off"}


def _build(tools: Toolset, go: Go, part: Path) -> None:
    """Leaves the programs in `part/bin`."""
    packages = list(tools.programs.values())
    say(
        f"{tools.named}: building {', '.join(tools.programs)} with {go.version}, once; "
        f"{tools.cost} of CPU where Go has compiled nothing of it yet"
    )
    progress = Progress()
    building = _Building(tools, go, part, progress)
    said = building.run(["list", "-deps", *packages], "downloading modules")
    # One line a package, and one a module that had to be downloaded.
    total = sum(not line.startswith("go: ") for line in said)
    building.run(
        ["build", "-v", *tools.arguments(), "-o", f"{part / 'bin'}{os.sep}", *packages],
        f"compiling, {{lines}} of at most {total} packages",
    )
    for name, package in tools.programs.items():
        # Go names a program by the last part of its package's path that is no version.
        made = re.sub(r"/v\d+$", "", package).rpartition("/")[2]
        (part / "bin" / made).rename(part / "bin" / name)
    progress.end(f"{tools.named}: built, in {{seconds}} s")


@dataclass(frozen=True, slots=True)
class _Building:
    tools: Toolset
    go: Go
    part: Path
    progress: Progress

    def run(self, arguments: list[str], doing: str) -> list[str]:
        """Runs `go` to its end and returns its output's lines. Raises StackError if it fails."""
        log = self.part / "log"

        def show(lines: list[str]) -> None:
            done = doing.replace("{lines}", str(len(lines)))
            self.progress.show(f"{self.tools.named}: {done}, {{seconds}} s")

        code, said = run(
            [self.go.program, *arguments],
            folder=self.tools.folder,
            # What it has to throw away goes away with the rest, however it ends.
            environment={**_environment(), "GOTMPDIR": str(self.part / "work")},
            log=log,
            show=show,
        )
        if code != 0:
            self.progress.clear()
            command = f"python -m dev.cluster build {self.tools.title.lower()}"
            tail = "\n".join(f"    {line}" for line in said[-_LOG_LINES:])
            raise StackError(
                f"`go {arguments[0]}` failed (exit code {code}); check the network and Go's module "
                f"proxy (GOPROXY), then run `{command}` again, which goes on from here. "
                f"Its last words, all of them in {log}:\n{tail}"
            )
        return said
