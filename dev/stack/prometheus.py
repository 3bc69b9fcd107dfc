"""Prometheus as a plain process, and promtool."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Final
from urllib.parse import urlsplit

from dev.stack import loopback
from dev.stack.errors import StackError
from dev.stack.locks import exclusive
from dev.stack.packages import cache_folder
from dev.stack.process import Server

SCRAPE_SECONDS: Final = 1
_PACKAGE: Final = "prometheus"


class NoPrometheusError(StackError):
    """This machine has no Prometheus, and none can be downloaded."""


@dataclass(frozen=True, slots=True)
class Programs:
    """The paths of the two programs."""

    prometheus: Path
    promtool: Path


@cache
def programs() -> Programs:
    """Return the programs on PATH, or those of Debian's package.

    The package is downloaded once into the cache and not installed. Raises NoPrometheusError if
    that is not possible.
    """
    on_path = shutil.which("prometheus"), shutil.which("promtool")
    if on_path[0] and on_path[1]:
        return Programs(Path(on_path[0]), Path(on_path[1]))
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        raise NoPrometheusError(
            "prometheus and promtool are not on PATH, and Debian's package cannot be downloaded, "
            "because this machine has no apt-get"
        )
    folder = cache_folder() / "prometheus"
    with exclusive(folder):
        if not folder.exists():
            _fetch(folder)
    return Programs(folder / "usr/bin/prometheus", folder / "usr/bin/promtool")


def _fetch(folder: Path) -> None:
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    lists = part / "lists"
    (lists / "partial").mkdir(parents=True)
    # The machine's own package lists can be missing, and only root can download them.
    own = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={part}"]
    if _run("apt-get", "download", _PACKAGE, folder=part) is not None:
        for options in (("update", "-qq"), ("download", _PACKAGE)):
            if (failed := _run("apt-get", *own, *options, folder=part)) is not None:
                raise NoPrometheusError(
                    f"put prometheus and promtool on PATH; apt-get cannot download them: {failed}"
                )
    shutil.rmtree(lists)
    for package in part.glob("*.deb"):
        if (failed := _run("dpkg-deb", "-x", package.name, ".", folder=part)) is not None:
            raise NoPrometheusError(f"{package.name} cannot be unpacked: {failed}")
        package.unlink()
    part.rename(folder)


def _run(*command: str, folder: Path) -> str | None:
    """Run a command. Returns None, or the last line of its errors if it failed."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


class PrometheusServer(Server):
    """Scrapes components every second. `targets` are the metrics URLs by component.

    Each component gets the labels that a PodMonitor would add: namespace, pod and job.
    """

    name: ClassVar[str] = "prometheus"

    def __init__(
        self,
        data: Path,
        targets: Mapping[str, str] | None = None,
        rules: Path | None = None,
        *,
        detached: bool = False,
    ) -> None:
        super().__init__(data, detached=detached)
        self._targets = targets or {}
        self._rules = rules

    @property
    def url(self) -> str:
        """The base URL for queries."""
        return f"http://127.0.0.1:{self.port}"

    def _prepare(self) -> None:
        scrapes = [
            {
                "job_name": f"shop/{component}",
                "metrics_path": urlsplit(url).path,
                "static_configs": [
                    {
                        "targets": [urlsplit(url).netloc],
                        "labels": {"namespace": "shop", "pod": f"{component}-0"},
                    }
                ],
            }
            for component, url in self._targets.items()
        ]
        every = f"{SCRAPE_SECONDS}s"
        config = {
            "global": {"scrape_interval": every, "evaluation_interval": every},
            "rule_files": [str(self._rules)] if self._rules else [],
            "scrape_configs": scrapes,
        }
        # JSON is YAML.
        (self.data / "prometheus.yml").write_text(json.dumps(config, indent=2))

    def _command(self) -> list[str]:
        return [
            str(programs().prometheus),
            f"--config.file={self.data / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.data / 'tsdb'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]

    def _ready(self) -> bool:
        with loopback.get(f"{self.url}/-/ready", 2) as answer:
            return bool(answer.status == 200)
