"""Packages the chart of a release with the digests of its images, and pushes it."""

import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import yaml

from dev.cluster.binaries import helm
from dev.release.changelog import section
from dev.release.checks import IMAGES
from dev.stack.errors import StackError

PLATFORMS: Final = ("linux/amd64", "linux/arm64")


@dataclass(frozen=True, slots=True)
class Release:
    version: str
    images: str
    """Registry and owner of the images and of the chart, such as registry.example/shop."""
    digests: Mapping[str, str]
    """The digest of each image by component."""
    source: str = ""
    """Address of the repository's page, or empty."""


def package(root: Path, release: Release, folder: Path) -> Path:
    """Package a copy of the chart whose values pin the images. Returns the path of the package.

    Raises StackError if the changelog lacks the version, or if Helm fails.
    """
    with TemporaryDirectory() as copy:
        chart = Path(copy) / "flashsale"
        shutil.copytree(root / "charts" / "flashsale", chart)
        values = chart / "values.yaml"
        values.write_text(_pin(values.read_text(), release))
        images = _images(yaml.safe_load(values.read_text()), release)
        about = yaml.safe_load((chart / "Chart.yaml").read_text())
        about["annotations"] |= {IMAGES: _block(images), **_annotations(root, release)}
        if release.source:
            about |= {"home": release.source, "sources": [release.source]}
        (chart / "Chart.yaml").write_text(yaml.safe_dump(about, sort_keys=False))
        folder.mkdir(parents=True, exist_ok=True)
        _helm("package", str(chart), "--destination", str(folder))
    return folder / f"flashsale-{about['version']}.tgz"


def push(package: Path, images: str, *, plain_http: bool = False) -> str:
    """Push a package to `images`/charts. Returns its name with its digest."""
    flags = ["--plain-http"] if plain_http else []
    output = _helm("push", str(package), f"oci://{images}/charts", *flags)
    if (digest := re.search(r"^Digest: (sha256:\w+)$", output, re.MULTILINE)) is None:
        raise StackError(f"`helm push` printed no digest: {output}")
    return f"{images}/charts/flashsale@{digest[1]}"


def _pin(values: str, release: Release) -> str:
    """Set the registry and the digests in the text of values.yaml, which keeps its comments."""
    pinned = [("image", "registry", release.images)]
    pinned += [(name, "digest", digest) for name, digest in release.digests.items()]
    for section_, key, value in pinned:
        # The first such key below the section's heading. The next section begins at a line's start.
        pattern = rf'(?m)^({section_}:\n(?:(?:[ #].*)?\n)*?\s+{key}: )""$'
        values, count = re.subn(pattern, rf'\g<1>"{value}"', values, count=1)
        if count != 1:
            raise StackError(f"values.yaml has no empty {key} in the section {section_}")
    return values


def _images(values: dict[str, Any], release: Release) -> list[Any]:
    return [
        {
            "name": name,
            "image": f"{release.images}/{values[name]['image']['repository']}"
            f":{release.version}@{digest}",
            "platforms": list(PLATFORMS),
        }
        for name, digest in release.digests.items()
    ]


def _annotations(root: Path, release: Release) -> dict[str, str]:
    """Return the annotations of Artifact Hub that the sources of the chart cannot have."""
    changes = [
        {"kind": kind, "description": text}
        for kind, text in section(root, release.version).changes()
    ]
    security = any(each["kind"] == "security" for each in changes)
    found = {
        "artifacthub.io/changes": _block(changes),
        "artifacthub.io/containsSecurityUpdates": str(security).lower(),
        "artifacthub.io/prerelease": str("-" in release.version).lower(),
    }
    if release.source:
        at = f"{release.source}/blob/v{release.version}/docs"
        links: list[Any] = [
            {"name": page.capitalize(), "url": f"{at}/{page}.md"}
            for page in ("install", "upgrade", "operations")
        ]
        links.append({"name": "support", "url": f"{release.source}/issues"})
        found["artifacthub.io/links"] = _block(links)
    return found


def _block(items: list[Any]) -> str:
    return yaml.safe_dump(items, sort_keys=False, allow_unicode=True, width=1000)


def _helm(*arguments: str) -> str:
    done = subprocess.run([helm(), *arguments], capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if done.returncode != 0:
        raise StackError(f"`helm {arguments[0]}` failed: {output.strip()}")
    return output
