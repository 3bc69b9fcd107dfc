"""The check of a release finds each file that disagrees with the others."""

import base64
import io
import re
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from dev.images.building import DEPLOYABLES
from dev.release.changelog import notes
from dev.release.checks import disagreements, read_digests
from dev.stack.errors import StackError
from tests.support.paths import CHART, ROOT, SAMPLES
from tests.support.released import VERSION, Tree, released

DIGESTS = {name: f"sha256:{number:064x}" for number, name in enumerate(DEPLOYABLES)}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return released(tmp_path / "tree")


@pytest.fixture
def digests(tmp_path: Path) -> Path:
    path = tmp_path / "digests"
    path.write_text("".join(f"{name} {digest}\n" for name, digest in DIGESTS.items()))
    return path


def packaged(folder: Path, **changes: dict[str, Any]) -> Path:
    """Write a package of the chart. `changes` replace the parts of one that agrees."""
    chart = {
        "version": VERSION,
        "appVersion": VERSION,
        "annotations": {
            "artifacthub.io/images": yaml.safe_dump(
                [
                    {
                        "name": name,
                        "image": f"registry.example/shop/flashsale/{name}:{VERSION}@{digest}",
                    }
                    for name, digest in (DIGESTS | changes.get("listed", {})).items()
                ]
            )
        },
    } | changes.get("chart", {})
    values: dict[str, Any] = {"image": {"registry": "registry.example/shop"}}
    for name, digest in (DIGESTS | changes.get("pinned", {})).items():
        values[name] = {"image": {"repository": f"flashsale/{name}", "digest": digest}}
    path = folder / "flashsale.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (("Chart.yaml", chart), ("values.yaml", values)):
            text = yaml.safe_dump(content).encode()
            info = tarfile.TarInfo(f"flashsale/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    return path


def test_a_release_whose_files_agree_has_no_disagreement(
    tree: Tree, tmp_path: Path, digests: Path
) -> None:
    assert disagreements(tree.root, VERSION, packaged(tmp_path), digests) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "place"),
    [
        ("pyproject.toml", 'version = "0.1.0"', 'version = "0.1.1"', "pyproject.toml: version"),
        ("src/flashsale/__init__.py", '"0.1.0"', '"0.1.1"', "__init__.py: __version__"),
        ("README.md", "**Status**: 0.1.0", "**Status**: 0.0.9", "README.md: Status"),
        ("README.md", "**Status**", "**State**", "README.md: Status is missing"),
        (
            "charts/flashsale/Chart.yaml",
            "\nversion: 0.1.0",
            "\nversion: 0.1.1",
            "Chart.yaml: version",
        ),
        (
            "charts/flashsale/Chart.yaml",
            "appVersion: 0.1.0",
            "appVersion: 0.1.1",
            "Chart.yaml: appVersion",
        ),
        *(
            (
                f"{folder}/Dockerfile",
                "ARG VERSION=0.1.0",
                "ARG VERSION=0.1.1",
                f"{folder}/Dockerfile: ARG VERSION",
            )
            for folder in DEPLOYABLES.values()
        ),
        (
            "k8s/values/kind.yaml",
            "api:\n",
            "api:\n  image: {tag: '1'}\n",
            "k8s/values/kind.yaml: api.image pins an image",
        ),
        (
            "k8s/redis/cluster.yaml",
            "flashsale/operator:0.1.0",
            "flashsale/operator:0.0.9",
            "k8s/redis/cluster.yaml: image of the Job is 0.0.9 instead of 0.1.0",
        ),
        (
            "CHANGELOG.md",
            "## Unreleased\n",
            "## Unreleased\n\n### Fixed\n\n- A fault.\n",
            "CHANGELOG.md: the section Unreleased has changes",
        ),
        ("CHANGELOG.md", "## Unreleased\n\n", "", "CHANGELOG.md does not begin with"),
        (
            "CHANGELOG.md",
            "## 0.1.0 - 2026-11-30",
            "## 0.1.1 - 2026-11-30",
            "CHANGELOG.md has no section `## 0.1.0 - YYYY-MM-DD`",
        ),
        (
            "CHANGELOG.md",
            "## 0.1.0",
            "## 0.2.0 - 2026-12-01\n\n### Added\n\n- More.\n\n## 0.1.0",
            "CHANGELOG.md: 0.1.0 is not the newest version",
        ),
        ("CHANGELOG.md", " - 2026-11-30", "", "CHANGELOG.md: the section 0.1.0 has no date"),
        ("CHANGELOG.md", "2026-11-30", "30.11.2026", "CHANGELOG.md: the section 0.1.0 has no date"),
        ("CHANGELOG.md", "### Added", "### News", "CHANGELOG.md: 'News' is not one of"),
    ],
)
def test_a_file_that_disagrees_is_named(
    tree: Tree, name: str, old: str, new: str, place: str
) -> None:
    tree.replace(name, old, new)
    (found,) = [each for each in disagreements(tree.root, VERSION) if place in each]
    assert disagreements(tree.root, VERSION)[0] == found


@pytest.mark.parametrize("key", ["tag", "digest"])
@pytest.mark.parametrize("component", DEPLOYABLES)
def test_the_sources_of_the_chart_pin_no_image(tree: Tree, component: str, key: str) -> None:
    path = tree.root / "charts/flashsale/values.yaml"
    head, heading, rest = path.read_text().partition(f"\n{component}:\n")
    path.write_text(head + heading + rest.replace(f'{key}: ""', f'{key}: "x"', 1))
    (found,) = disagreements(tree.root, VERSION)
    assert f"{component}.image.{key} is x instead of empty" in found


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chart": {"version": "0.1.1"}}, "flashsale.tgz: version is 0.1.1 instead of 0.1.0"),
        ({"chart": {"appVersion": "0.1.1"}}, "flashsale.tgz: appVersion is 0.1.1"),
        ({"chart": {"annotations": {}}}, "artifacthub.io/images has None instead of"),
        ({"pinned": {"api": ""}}, "api.image.digest is empty"),
        ({"listed": {"api": f"sha256:{9:064x}"}}, "artifacthub.io/images has"),
        (
            {"listed": {"api": f"sha256:{9:064x}"}, "pinned": {"api": f"sha256:{9:064x}"}},
            f"but the pushed image is {DIGESTS['api']}",
        ),
    ],
)
def test_a_package_that_disagrees_with_the_pushed_images_is_found(
    tree: Tree, tmp_path: Path, digests: Path, changes: dict[str, Any], words: str
) -> None:
    found = disagreements(tree.root, VERSION, packaged(tmp_path, **changes), digests)
    assert any(words in each for each in found), found


@pytest.mark.parametrize("version", ["", "v0.1.0", "0.1", "0.1.0-beta", "0.1.0\n", "01.1.0"])
def test_a_version_in_another_format_is_refused(tree: Tree, version: str) -> None:
    (found,) = disagreements(tree.root, version)
    assert "is not a version such as" in found


def test_a_release_candidate_is_written_in_the_format_of_python(tree: Tree) -> None:
    tree.replace("pyproject.toml", 'version = "0.1.0"', 'version = "0.1.0rc1"')
    tree.replace("src/flashsale/__init__.py", '"0.1.0"', '"0.1.0rc1"')
    for name in ("README.md", *(f"{each}/Dockerfile" for each in DEPLOYABLES.values())):
        path = tree.root / name
        path.write_text(
            re.sub(r"(Status\*\*: |VERSION=)0\.1\.0", r"\g<1>0.1.0-rc.1", path.read_text())
        )
    tree.replace("CHANGELOG.md", "## 0.1.0", "## 0.1.0-rc.1")
    tree.replace("k8s/redis/cluster.yaml", "operator:0.1.0", "operator:0.1.0-rc.1")
    chart = tree.root / "charts/flashsale/Chart.yaml"
    chart.write_text(re.sub(r"(?m)ersion: 0\.1\.0$", "ersion: 0.1.0-rc.1", chart.read_text()))
    assert disagreements(tree.root, "0.1.0-rc.1") == []


@pytest.mark.parametrize(
    "text",
    ["api sha256:1\n", f"gateway sha256:{0:064x}\n", f"api sha256:{0:064x}\n", "", "api \udcff\n"],
)
def test_a_bad_list_of_digests_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "digests"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(StackError, match=r"digests: "):
        read_digests(path)


def test_a_file_that_is_no_package_is_refused(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "chart.tgz").write_text("no archive")
    for name in ("chart.tgz", "missing.tgz"):
        with pytest.raises(StackError, match="is not a package of the chart"):
            disagreements(tree.root, VERSION, tmp_path / name)


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({}, "Chart.yaml: filename 'flashsale/Chart.yaml' not found"),
        ({"Chart.yaml": b""}, "Chart.yaml: Expected `object`, got `null`"),
        ({"Chart.yaml": b"a: {"}, "Chart.yaml: while parsing a flow node"),
        ({"Chart.yaml": b"\x9b"}, "Chart.yaml: unacceptable character"),
        ({"values.yaml": b"api: {}"}, "values.yaml: Object missing required field `image`"),
        ({"values.yaml": b"image: {}"}, r"values.yaml: .*`registry` - at `\$.image`"),
    ],
)
def test_a_package_with_other_files_is_refused(
    tree: Tree, tmp_path: Path, files: dict[str, bytes], why: str
) -> None:
    about = {"Chart.yaml": b"{version: '1', appVersion: '1'}"} if "values.yaml" in files else {}
    path = tmp_path / "chart.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in (about | files).items():
            info = tarfile.TarInfo(f"flashsale/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    with pytest.raises(StackError, match=f"chart.tgz is not a package of the chart: {why}"):
        disagreements(tree.root, VERSION, path)


@pytest.mark.parametrize("length", [1, 20, 300])
def test_a_truncated_package_is_refused(tree: Tree, tmp_path: Path, length: int) -> None:
    path = packaged(tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(StackError, match="is not a package of the chart: "):
        disagreements(tree.root, VERSION, path)


def test_the_notes_of_a_release_are_its_section_of_the_changelog(tree: Tree) -> None:
    text = notes(tree.root, VERSION)
    assert text.startswith("### Added")
    assert text.endswith("- Chart: restricted pods.")
    with pytest.raises(StackError, match=r"no section `## 9\.9\.9"):
        notes(tree.root, "9.9.9")
    with pytest.raises(StackError, match=r"^VERSION is empty"):
        notes(tree.root, "")


def test_the_icon_and_the_example_of_the_chart_are_those_of_their_files() -> None:
    about = yaml.safe_load((CHART / "Chart.yaml").read_text())
    kind, _, content = about["icon"].partition(",")
    assert kind == "data:image/svg+xml;base64"
    assert base64.b64decode(content) == (CHART / "icon.svg").read_bytes()
    sample = yaml.safe_load((SAMPLES / "iphone-15.yaml").read_text())
    assert yaml.safe_load(about["annotations"]["artifacthub.io/crdsExamples"]) == [sample]


@pytest.mark.parametrize(
    ("target", "variable"),
    [("release-digests", "DIGESTS"), ("release-chart", "DIGESTS"), ("release-push", "CHART")],
)
def test_a_target_without_its_file_or_registry_explains_itself(
    target: str, variable: str, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for given in ("IMAGES=r/shop", f"{variable}={file}"):
        # Without -o, make could install .venv first.
        done = subprocess.run(
            ["make", "-o", ".venv/.ready", target, given],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert f"make {target} IMAGES=registry.example/shop {variable}=FILE" in done.stderr
