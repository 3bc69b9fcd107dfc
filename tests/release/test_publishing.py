"""The images and the chart of a release, pushed to a registry on loopback.

It needs Go, and Debian or Ubuntu as root for buildah. The images have a stand-in base.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Final, NamedTuple

import pytest
import yaml

from dev.cluster.binaries import helm
from dev.images.base import python_version, stand_in
from dev.images.buildah import Buildah, buildah
from dev.images.building import DEPLOYABLES, network
from dev.release.chart import Release, package, push
from dev.release.checks import disagreements
from dev.release.images import pushed
from dev.stack.errors import StackError
from dev.stack.locks import exclusive
from tests.support.chart import ADDRESSES
from tests.support.paths import DOCS, ROOT
from tests.support.released import VERSION, released

SOURCE: Final = "https://git.example/shop/flashsale"


@pytest.fixture(scope="module")
def builder() -> Buildah:
    """buildah, with the stand-in for the base image."""
    try:
        tool = buildah()
        with exclusive(tool.folder / "store"):
            stand_in(tool)
    except StackError as error:
        pytest.skip(str(error))
    return tool


def documented_push() -> str:
    """The command of docs/install.md that builds and pushes the images."""
    found = re.findall(r"^make push .*$", (DOCS / "install.md").read_text(), re.MULTILINE)
    (command,) = found
    return str(command)


class Published(NamedTuple):
    """Where the images are, and the output of the command that pushed them."""

    images: str
    output: str


@pytest.fixture(scope="module")
def published(builder: Buildah, registry: str) -> Published:
    """The images, pushed with the documented command to the registry on loopback."""
    images = f"{registry}/shop"
    environment = {
        **os.environ,
        "BUILDER": f"buildah --root {builder.folder}/store --runroot {builder.folder}/run",
        "BUILDAH_ISOLATION": "chroot",
        "PUSH_FLAGS": "--quiet --tls-verify=false",
    }
    with exclusive(builder.folder / "store"), network() as mounts:
        base = f"--build-arg=PYTHON_IMAGE=python:{python_version()}-slim"
        flags = ["--quiet", "--pull=never", base, *mounts]
        done = subprocess.run(
            re.sub(r"IMAGES=\S+", f"IMAGES={images}", documented_push()).split(),
            cwd=ROOT,
            env={**environment, "BUILD_FLAGS": " ".join(flags)},
            capture_output=True,
            text=True,
            check=False,
        )
        for name in DEPLOYABLES:  # the registry has them now
            builder.ask("rmi", "--force", f"{images}/flashsale/{name}:{VERSION}")
    assert done.returncode == 0, done.stderr
    return Published(images, done.stdout)


def test_the_documented_command_pushes_images_that_the_chart_installs(
    published: Published, release_tools: Path, tmp_path: Path
) -> None:
    flag = re.search(r"--set image\.registry=\S+", published.output)
    assert flag is not None
    (tmp_path / "values.yaml").write_text(yaml.safe_dump(ADDRESSES))
    rendered = subprocess.run(
        [
            helm(), "template", "shop", "charts/flashsale",
            "--values", tmp_path / "values.yaml", *flag[0].split(),
        ],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    wanted = set(re.findall(r'image: "(.+)"', rendered))
    assert wanted == {f"{published.images}/flashsale/{name}:{VERSION}" for name in DEPLOYABLES}
    for image in wanted:
        config = subprocess.run(
            [release_tools / "crane", "config", image], capture_output=True, text=True, check=True
        ).stdout
        labels = json.loads(config)["config"]["Labels"]
        assert labels["org.opencontainers.image.version"] == VERSION
        assert re.fullmatch(r"[0-9a-f]{40}", labels["org.opencontainers.image.revision"])


def test_a_released_chart_installs_the_pushed_images_by_digest(
    published: Published, tmp_path: Path
) -> None:
    images = published.images
    digests = dict(pushed(images, VERSION))
    listed = tmp_path / "digests"
    listed.write_text("".join(f"{name} {digest}\n" for name, digest in digests.items()))

    tree = released(tmp_path / "tree")
    path = package(tree.root, Release(VERSION, images, digests, SOURCE), tmp_path)
    assert disagreements(tree.root, VERSION, path, listed) == []
    named = push(path, images, plain_http=True)
    assert re.fullmatch(rf"{re.escape(images)}/charts/flashsale@sha256:[0-9a-f]{{64}}", named)

    def ask(*arguments: str) -> str:
        return subprocess.run(
            [helm(), *arguments, f"oci://{images}/charts/flashsale", "--plain-http"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    about = yaml.safe_load(ask("show", "chart"))
    assert (about["home"], about["sources"]) == (SOURCE, [SOURCE])
    annotations = {
        name.removeprefix("artifacthub.io/"): yaml.safe_load(value)
        for name, value in about["annotations"].items()
    }
    assert annotations["changes"] == [
        {"kind": "added", "description": "API: `POST /reserve`."},
        {"kind": "security", "description": "Chart: restricted pods."},
    ]
    assert annotations["containsSecurityUpdates"] is True
    assert annotations["prerelease"] is False
    assert [each["name"] for each in annotations["images"]] == list(DEPLOYABLES)
    for link in annotations["links"]:
        page = link["url"].removeprefix(f"{SOURCE}/blob/v{VERSION}/")
        assert link["name"] == "support" or (ROOT / page).is_file()

    (tmp_path / "values.yaml").write_text(yaml.safe_dump(ADDRESSES))
    rendered = ask("template", "shop", "--values", str(tmp_path / "values.yaml"))
    assert set(re.findall(r'image: "(.+)"', rendered)) == {
        f"{images}/flashsale/{name}@{digest}" for name, digest in digests.items()
    }


def test_the_digests_of_images_that_are_not_pushed_are_an_error(registry: str) -> None:
    with pytest.raises(StackError, match=r"other/flashsale/api:0\.1\.0 has no digest"):
        dict(pushed(f"{registry}/other", VERSION))


def test_a_push_without_a_registry_explains_itself() -> None:
    done = subprocess.run(
        ["make", "push", "IMAGES="], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "make push IMAGES=registry.example/shop" in done.stderr


def verify(digests: Path, source: str, path: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `make release-verify`, with `path` before the PATH."""
    return subprocess.run(
        ["make", "release-verify", "IMAGES=r/shop", f"SOURCE={source}", f"DIGESTS={digests}"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_verification_without_a_source_or_digests_explains_itself(tmp_path: Path) -> None:
    digests = tmp_path / "digests"
    digests.touch()
    for done in (verify(digests, SOURCE), verify(tmp_path / "none", SOURCE), verify(digests, "")):
        assert done.returncode == 2
        assert "make release-verify IMAGES=registry.example/shop SOURCE=" in done.stderr


def test_one_image_without_the_release_s_signature_fails_the_verification(tmp_path: Path) -> None:
    """cosign is a stand-in, because the real one needs the public service of Sigstore."""
    cosign, digests = tmp_path / "cosign", tmp_path / "digests"
    cosign.write_text('#!/bin/sh\necho "$@" >&2\ncase "$2" in *unsigned) exit 10;; esac\n')
    cosign.chmod(0o755)

    digests.write_text("".join(f"{name} sha256:0\n" for name in DEPLOYABLES))
    done = verify(digests, SOURCE, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert re.findall(
        r"^verify (\S+)@sha256:0 --annotations image=(\S+) --certificate-identity (\S+) ",
        done.stderr,
        re.MULTILINE,
    ) == [
        (image, image, f"{SOURCE}/.github/workflows/release.yml@refs/tags/v{VERSION}")
        for image in (f"r/shop/flashsale/{name}" for name in DEPLOYABLES)
    ]

    names = list(DEPLOYABLES)
    digests.write_text(f"{names[0]} sha256:0\n{names[1]} sha256:unsigned\n{names[2]} sha256:0")
    assert verify(digests, SOURCE, str(tmp_path)).returncode != 0
