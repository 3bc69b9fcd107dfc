"""The deployables' images, each built by its own Dockerfile, as `docker build` would."""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dev.images.base import stand_in
from dev.images.buildah import Buildah, buildah
from dev.paths import ROOT
from dev.progress import Progress
from dev.stack.locks import exclusive

DEPLOYABLES: Final = {
    "api": Path("services/api"),
    "consumer": Path("services/consumer"),
    "operator": Path("operator"),
}
CONTENT: Final = "dev.flashsale.content"
_PIP: Final = ("index-url", "extra-index-url", "trusted-host", "proxy", "timeout", "retries")
_CERTIFICATES: Final = Path("/etc/ssl/certs")


@dataclass(frozen=True, slots=True)
class Image:
    """An image in buildah's store. The content's digest is its tag."""

    reference: str
    size: int
    """Bytes of all layers, unpacked."""
    added: int
    """Bytes of those that the base does not have."""
    built: bool
    """Whether it was built now, and not before."""


def build(names: list[str]) -> Iterator[Image]:
    """Builds what has changed since the last time, with progress on stderr."""
    tool = buildah()
    with exclusive(tool.folder / "store"):
        tool.ask("rm", "--all")  # what a build that failed left
        base = stand_in(tool)
        for name in names:
            yield _image(tool, base, name)


def variant(reference: str, tag: str) -> str:
    """Makes another image of one that was built, which differs in a label; returns its name."""
    tool = buildah()
    other = f"{reference.rpartition(':')[0]}:{tag}"
    with exclusive(tool.folder / "store"):
        container = tool.ask("from", reference)
        try:
            tool.ask("config", "--label", f"dev.flashsale.variant={tag}", container)
            tool.ask("commit", "--quiet", container, other)
        finally:
            tool.ask("rm", container)
    return other


def wrap(program: Path, reference: str) -> None:
    """Makes an image of one static program, unless that was done."""
    tool = buildah()
    key = hashlib.sha256(program.read_bytes()).hexdigest()[:12]
    with exclusive(tool.folder / "store"):
        if tool.label(reference, CONTENT) != key:
            entry = f"/{program.name}"
            config = ("--entrypoint", json.dumps([entry]), "--label", f"{CONTENT}={key}")
            tool.commit(program, reference, *config, at=entry)


def _image(tool: Buildah, base: str, name: str) -> Image:
    folder = DEPLOYABLES[name]
    base_layers = tool.layers(base)
    key = _key(folder, base_layers)
    reference = f"flashsale/{name}:{key}"
    built = tool.label(reference, CONTENT) != key
    if built:
        progress = Progress()
        with network() as mounts:
            tool.build(
                *("--layers", "--file", str(folder / "Dockerfile"), "--tag", reference),
                *("--label", f"{CONTENT}={key}", *mounts, "."),
                folder=ROOT,
                show=lambda lines: progress.show(f"{name}: {_step(lines)}, {{seconds}} s"),
            )
        progress.end(f"{name}: built, in {{seconds}} s")
    layers = tool.layers(reference)
    return Image(reference, sum(layers), sum(layers[len(base_layers) :]), built)


def _key(folder: Path, base_layers: list[int]) -> str:
    """What two images that may differ differ in."""
    sources = [
        ROOT / ".dockerignore",
        ROOT / folder / "Dockerfile",
        ROOT / folder / "requirements.txt",
    ]
    (package,) = (path.parent for path in (ROOT / folder).glob("flashsale_*/__init__.py"))
    for tree in (ROOT / "src/flashsale", package):
        sources += [path for path in tree.rglob("*") if path.is_file()]
    digest = hashlib.sha256(repr(base_layers).encode())
    for path in sorted(sources):
        if "__pycache__" not in path.parts:
            digest.update(f"\0{path.relative_to(ROOT)}\0{path.stat().st_mode & 0o777}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _step(lines: list[str]) -> str:
    """The instruction that is being carried out."""
    steps = [line for line in lines if "STEP" in line]
    return steps[-1].partition("STEP ")[2][:60] if steps else "starting"


@contextmanager
def network() -> Iterator[list[str]]:
    """How this machine reaches its package index: its certificates, and its settings of pip.

    They are mounted for the build, and so leave no trace in an image.
    """
    mounts = []
    if _CERTIFICATES.is_dir():
        mounts += ["--volume", f"{_CERTIFICATES}:{_CERTIFICATES}:ro"]
    settings = {
        name: value
        for name in _PIP
        if (value := os.environ.get(f"PIP_{name.upper().replace('-', '_')}"))
    }
    if "timeout" not in settings and (value := os.environ.get("PIP_DEFAULT_TIMEOUT")):
        settings["timeout"] = value
    with tempfile.NamedTemporaryFile("w", prefix="pip-", suffix=".conf") as conf:
        conf.write("[global]\n")
        conf.writelines(f"{name} = {value}\n" for name, value in settings.items())
        conf.flush()
        yield [*mounts, "--volume", f"{conf.name}:/etc/pip.conf:ro"]
