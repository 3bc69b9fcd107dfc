"""Builds the deployables' images from their Dockerfiles, as `docker build` would."""

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
    """An image in buildah's store. Its tag is a digest of its sources."""

    reference: str
    size: int
    """Unpacked bytes of all layers."""
    added: int
    """Unpacked bytes of the layers on top of the base."""
    built: bool
    """Whether this call built it."""


def build(names: list[str]) -> Iterator[Image]:
    """Build the images whose sources have changed, with progress on stderr, and yield all."""
    tool = buildah()
    with exclusive(tool.folder / "store"):
        tool.ask("rm", "--all")  # containers left by a failed build
        base = stand_in(tool)
        for name in names:
            yield _image(tool, base, name)


def variant(reference: str, tag: str) -> str:
    """Make a copy of an image that differs in a label. Returns its name."""
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
    """Make an image of one static program, unless it exists."""
    tool = buildah()
    key = hashlib.sha256(program.read_bytes()).hexdigest()[:12]
    with exclusive(tool.folder / "store"):
        if tool.label(reference, CONTENT) != key:
            entry = f"/{program.name}"
            tool.commit(
                program,
                reference,
                f"--entrypoint={json.dumps([entry])}",
                f"--label={CONTENT}={key}",
                at=entry,
            )


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
                "--layers",
                f"--file={folder / 'Dockerfile'}",
                f"--tag={reference}",
                f"--label={CONTENT}={key}",
                f"--build-arg=PYTHON_IMAGE={base}",
                *mounts,
                ".",
                folder=ROOT,
                show=lambda lines: progress.show(f"{name}: {_step(lines)}, {{seconds}} s"),
            )
        progress.end(f"{name}: built in {{seconds}} s")
    layers = tool.layers(reference)
    return Image(reference, sum(layers), sum(layers[len(base_layers) :]), built)


def _key(folder: Path, base_layers: list[int]) -> str:
    """Return a digest of everything that can change the image."""
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
    """Return the current instruction of the Dockerfile."""
    steps = [line for line in lines if "STEP" in line]
    return steps[-1].partition("STEP ")[2][:60] if steps else "starting"


@contextmanager
def network() -> Iterator[list[str]]:
    """Yield mounts with this machine's certificates and pip settings, for access to its index.

    Mounts exist only during the build, so they leave no trace in an image.
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
