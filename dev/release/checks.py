"""Checks that every file of a release names the same version and the same images."""

import datetime as dt
import re
import tarfile
import tomllib
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import yaml

from dev.images.building import DEPLOYABLES
from dev.release.changelog import sections
from dev.stack.errors import StackError

DIGEST: Final = re.compile(r"sha256:[0-9a-f]{64}")
IMAGES: Final = "artifacthub.io/images"
_VERSION: Final = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}(-rc\.[1-9]\d*)?")
_CHART: Final = Path("charts/flashsale")


class _Chart(msgspec.Struct, rename="camel"):
    """The checked part of a package's Chart.yaml."""

    version: str
    app_version: str
    annotations: dict[str, str] = {}


class _Listed(msgspec.Struct):
    """An image in the annotation `IMAGES`."""

    name: str
    image: str


class _Registry(msgspec.Struct):
    registry: str


class _Image(msgspec.Struct):
    repository: str
    digest: str


class _Component(msgspec.Struct):
    image: _Image


class _Values(msgspec.Struct):
    """The checked part of a package's values.yaml."""

    image: _Registry
    api: _Component
    consumer: _Component
    operator: _Component


class _Package(NamedTuple):
    chart: _Chart
    values: _Values
    listed: list[_Listed]


def disagreements(
    root: Path, version: str, package: Path | None = None, digests: Path | None = None
) -> list[str]:
    """Return a line for each file that does not belong to a release of this version.

    Without `package` only the sources are checked. `digests` has the digests of pushed images.
    Raises StackError if a file cannot be read.
    """
    if not _VERSION.fullmatch(version):
        return [f"{version!r} is not a version such as 1.2.3 or 1.2.3-rc.1, without `v`"]
    found = [*_versions(root, version), *_values(root), *_changelog(root, version)]
    if package is not None:
        pushed = None if digests is None else read_digests(digests)
        found += _package(package, version, pushed)
    return found


def read_digests(path: Path) -> dict[str, str]:
    """Return the digest of each image, from lines `NAME DIGEST`. Raises StackError otherwise."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise StackError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise StackError(f"{path}: not UTF-8") from None
    found: dict[str, str] = {}
    for line in filter(str.strip, lines):
        name, _, digest = line.strip().partition(" ")
        if name not in DEPLOYABLES or not DIGEST.fullmatch(digest):
            raise StackError(f"{path}: {line!r} is not `NAME sha256:…` of {', '.join(DEPLOYABLES)}")
        found[name] = digest
    if missing := [name for name in DEPLOYABLES if name not in found]:
        raise StackError(f"{path}: the digest of {missing[0]} is missing")
    return found


def _versions(root: Path, version: str) -> Iterator[str]:
    chart = yaml.safe_load((root / _CHART / "Chart.yaml").read_text())
    # Python spells 1.2.3-rc.1 as 1.2.3rc1.
    python = version.replace("-rc.", "rc")
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    named: dict[str, tuple[str | None, str]] = {
        "pyproject.toml: version": (project, python),
        "src/flashsale/__init__.py: __version__": (
            _match(root / "src/flashsale/__init__.py", r'^__version__: Final = "(.+)"$'),
            python,
        ),
        "k8s/redis/cluster.yaml: image of the Job": (
            _match(root / "k8s/redis/cluster.yaml", r"^ *image: flashsale/operator:(.+)$"),
            version,
        ),
        "README.md: Status": (_match(root / "README.md", r"^\*\*Status\*\*: ([^\s,]+)"), version),
        **{
            f"{_CHART}/Chart.yaml: {key}": (str(chart.get(key)), version)
            for key in ("version", "appVersion")
        },
        **{
            f"{folder}/Dockerfile: ARG VERSION": (
                _match(root / folder / "Dockerfile", r"^ARG VERSION=(.*)$"),
                version,
            )
            for folder in DEPLOYABLES.values()
        },
    }
    for place, (actual, expected) in named.items():
        if actual != expected:
            yield f"{place} is {actual or 'missing'} instead of {expected}"


def _match(path: Path, pattern: str) -> str | None:
    found = re.search(pattern, path.read_text(), re.MULTILINE)
    return found[1] if found else None


def _values(root: Path) -> Iterator[str]:
    """The sources name no images, because a release sets them in the packaged chart."""
    values = yaml.safe_load((root / _CHART / "values.yaml").read_text())
    for component in DEPLOYABLES:
        for key in ("tag", "digest"):
            if value := values[component]["image"][key]:
                yield f"{_CHART}/values.yaml: {component}.image.{key} is {value} instead of empty"
    for path in sorted((root / "k8s" / "values").glob("*.yaml")):
        own = yaml.safe_load(path.read_text()) or {}
        for component in DEPLOYABLES:
            if (own.get(component) or {}).get("image"):
                yield f"k8s/values/{path.name}: {component}.image pins an image"


def _changelog(root: Path, version: str) -> Iterator[str]:
    found = sections(root)
    names = [each.name for each in found]
    if names[:1] != ["Unreleased"]:
        yield "CHANGELOG.md does not begin with the section Unreleased"
    elif found[0].text:
        yield f"CHANGELOG.md: the section Unreleased has changes; move them to {version}"
    if version not in names:
        yield f"CHANGELOG.md has no section `## {version} - YYYY-MM-DD`"
        return
    own = found[names.index(version)]
    if names.index(version) != 1:
        yield f"CHANGELOG.md: {version} is not the newest version"
    if not _is_date(own.date):
        yield f"CHANGELOG.md: the section {version} has no date YYYY-MM-DD"
    try:
        if not list(own.changes()):
            yield f"CHANGELOG.md: the section {version} lists no changes"
    except StackError as error:
        yield str(error)


def _is_date(text: str | None) -> bool:
    try:
        return dt.date.fromisoformat(text or "").isoformat() == text
    except ValueError:
        return False


def _package(package: Path, version: str, pushed: Mapping[str, str] | None) -> Iterator[str]:
    chart, values, listed = _read(package)
    for key, named in (("version", chart.version), ("appVersion", chart.app_version)):
        if named != version:
            yield f"{package.name}: {key} is {named} instead of {version}"
    images = {each.name: each.image for each in listed}
    for component in DEPLOYABLES:
        own: _Image = getattr(values, component).image
        digest = own.digest
        if not DIGEST.fullmatch(digest):
            yield f"{package.name}: {component}.image.digest is {digest or 'empty'}"
            continue
        name = f"{values.image.registry}/{own.repository}:{version}@{digest}"
        if images.get(component) != name:
            yield f"{package.name}: {IMAGES} has {images.get(component)} instead of {name}"
        if pushed is not None and pushed[component] != digest:
            yield (
                f"{package.name}: {component}.image.digest is {digest}, "
                f"but the pushed image is {pushed[component]}"
            )


def _read(package: Path) -> _Package:
    """Read Chart.yaml and values.yaml of a package. Raises StackError if they are no chart's."""
    name = ""
    try:
        with tarfile.open(package) as tar:
            name = "Chart.yaml: "
            chart = msgspec.convert(_member(tar, "Chart.yaml"), _Chart)
            name = "values.yaml: "
            values = msgspec.convert(_member(tar, "values.yaml"), _Values)
        name = f"{IMAGES}: "
        listed = yaml.safe_load(chart.annotations.get(IMAGES, "[]"))
        return _Package(chart, values, msgspec.convert(listed, list[_Listed]))
    except (
        OSError,
        EOFError,
        KeyError,
        zlib.error,
        tarfile.TarError,
        yaml.YAMLError,
        msgspec.ValidationError,
    ) as error:
        why = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        raise StackError(f"{package} is not a package of the chart: {name}{why}") from None


def _member(tar: tarfile.TarFile, name: str) -> object:
    content: object = yaml.safe_load(tar.extractfile(f"flashsale/{name}") or b"")
    return content
