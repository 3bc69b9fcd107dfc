"""buildah, which builds images without a daemon, with a store of its own."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dev import debian
from dev.progress import run
from dev.stack.errors import StackError
from dev.stack.packages import cache_folder

_LOG_LINES: Final = 20


@dataclass(frozen=True, slots=True)
class Buildah:
    """buildah with its store in one folder, separate from the machine's own images."""

    folder: Path

    def ask(self, *arguments: str) -> str:
        """Run buildah to its end and return its output. Raises StackError if it fails."""
        done = subprocess.run(
            [*self._command(), *arguments], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise StackError(f"`buildah {arguments[0]}` failed: {done.stderr.strip()}")
        return done.stdout.strip()

    def build(self, *arguments: str, folder: Path, show: Callable[[list[str]], None]) -> None:
        """Run `buildah build`. `show` gets the output so far. Raises StackError if it fails."""
        log = self.folder / "build.log"
        # chroot, because containers are rarely allowed inside another container or in CI.
        command = [*self._command(), "build", "--isolation=chroot", "--pull=never", *arguments]
        code, output = run(command, folder=folder, environment=dict(os.environ), log=log, show=show)
        if code != 0:
            tail = "\n".join(f"    {line}" for line in output[-_LOG_LINES:])
            raise StackError(
                f"`buildah build` failed (exit code {code}). The end of its output ({log}):\n{tail}"
            )

    def commit(self, source: Path, name: str, *config: str, at: str = "/") -> None:
        """Make an image with one layer, from a tar of a root folder or from a program."""
        container = self.ask("from", "scratch")
        try:
            self.ask("add", "--quiet", container, str(source), at)
            self.ask("config", *config, container)
            self.ask("commit", "--quiet", container, name)
        finally:
            self.ask("rm", container)

    def label(self, name: str, label: str) -> str | None:
        """Return the value of an image's label, or None without the label or the image."""
        found = self._inspect(name)
        labels: dict[str, str] = ((found or {}).get("OCIv1") or {}).get("config", {}).get(
            "Labels"
        ) or {}
        return labels.get(label)

    def layers(self, name: str) -> list[int]:
        """Return the unpacked bytes of each layer, beginning with the base's."""
        found = self._inspect(name)
        if found is None:
            raise StackError(f"there is no image {name}")
        return [layer["size"] for layer in json.loads(found["Manifest"])["layers"]]

    def _inspect(self, name: str) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads(self.ask("inspect", "--type", "image", name))
        except StackError:
            return None
        return found

    def _command(self) -> list[str]:
        store, run = self.folder / "store", self.folder / "run"
        return ["buildah", "--root", str(store), "--runroot", str(run)]


def buildah() -> Buildah:
    """Return buildah, and install it first if needed. Raises StackError if that is impossible."""
    debian.require(
        {program: program for program in ("buildah", "mmdebstrap")},
        "building images (with Docker, use the command in each Dockerfile's first line)",
    )
    folder = cache_folder() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    return Buildah(folder)
