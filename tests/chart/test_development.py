"""kind-config.yaml and the Tiltfile are valid and match the chart, k8s and the Dockerfiles.

kind's own parser reads kind-config.yaml. Tilt is not published as a Go module, so Tilt's
interpreter runs the Tiltfile with stand-ins for the builtins of Tilt: see checks/tiltfile.
"""

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from dev.images.building import DEPLOYABLES
from tests.support.chart import Helm, Manifest, Refused, merged
from tests.support.paths import CHART, ROOT

pytestmark = pytest.mark.slow

CHECKS: Final = Path(__file__).with_name("checks")
WORKLOADS: Final = ("Deployment", "StatefulSet", "Job", "Pod")

Call = dict[str, Any]


def checked(check: str, *arguments: str) -> str:
    """Run a Go program in `checks` and return its output. Raises `Refused` if it fails."""
    done = subprocess.run(
        ["go", "run", f"./{check}", *arguments],
        cwd=CHECKS,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise Refused(done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def kind(kubernetes: object) -> Manifest:  # noqa: ARG001 - skips the test if Go is missing
    """The configuration as kind reads it, with all defaults."""
    cluster: Manifest = json.loads(checked("kind", str(ROOT / "kind-config.yaml")))
    return cluster


@pytest.fixture(scope="module")
def calls(chart: Helm) -> dict[str, list[Call]]:  # noqa: ARG001 - skips the test if Go is missing
    """The Tiltfile's calls of Tilt's builtins under `tilt up` and under `tilt ci`."""
    return {
        command: [
            json.loads(line)
            for line in checked("tiltfile", str(ROOT / "Tiltfile"), command).splitlines()
        ]
        for command in ("up", "ci")
    }


def all_of(calls: list[Call], builtin: str) -> list[dict[str, Any]]:
    return [each["with"] for each in calls if each["call"] == builtin]


@pytest.fixture(scope="module")
def objects(chart: Helm, calls: dict[str, list[Call]]) -> list[Manifest]:
    """Every Kubernetes object that the Tiltfile passes to Tilt."""
    found: list[Manifest] = []
    (helm,) = all_of(calls["up"], "helm")
    assert (ROOT / helm["pathToChartDir"] / "Chart.yaml").exists()
    values = merged(*(yaml.safe_load((ROOT / file).read_text()) for file in helm["values"]))
    found += chart.render_only(values).manifests
    assert (
        chart.render_only(values).all("Deployment")[0]["metadata"]["name"].startswith(helm["name"])
    )
    for given in all_of(calls["up"], "k8s_yaml"):
        files = given["yaml"] if isinstance(given["yaml"], list) else [given["yaml"]]
        for file in files:
            if file != "<helm>":
                found += [each for each in yaml.safe_load_all((ROOT / file).read_text()) if each]
    return found


def test_tilt_does_not_deploy_the_objects_of_helm_test() -> None:
    """Tilt leaves out the templates in a folder `tests`, whatever hooks they have."""
    templates = (CHART / "templates").rglob("*.yaml")
    folders = {
        path.parent.name for path in templates if "flashsale.test.metadata" in path.read_text()
    }
    assert folders == {"tests"}


def test_kind_creates_a_control_plane_and_two_workers_in_two_zones(kind: Manifest) -> None:
    assert Counter(node["Role"] for node in kind["Nodes"]) == {"control-plane": 1, "worker": 2}
    workers = [node for node in kind["Nodes"] if node["Role"] == "worker"]
    zones = {worker["Labels"]["topology.kubernetes.io/zone"] for worker in workers}
    assert len(zones) == 2


def test_kind_maps_the_apis_node_port_to_port_8080(kind: Manifest, objects: list[Manifest]) -> None:
    (mapping,) = (port for node in kind["Nodes"] for port in node["ExtraPortMappings"])
    services = [each for each in objects if each["kind"] == "Service"]
    (port,) = (port for each in services for port in each["spec"]["ports"] if "nodePort" in port)
    assert (mapping["HostPort"], mapping["ContainerPort"]) == (8080, port["nodePort"])


@pytest.mark.parametrize(
    ("before", "after"),
    [("extraPortMappings", "portMappings"), ("role: worker", "role: waiter"), ("30080", "300800")],
)
def test_kind_refuses_a_mistake(kind: Manifest, tmp_path: Path, before: str, after: str) -> None:
    assert kind
    text = (ROOT / "kind-config.yaml").read_text()
    wrong = tmp_path / "kind-config.yaml"
    wrong.write_text(text.replace(before, after))
    assert wrong.read_text() != text
    with pytest.raises(Refused):
        checked("kind", str(wrong))


def test_an_image_is_rebuilt_if_a_file_that_its_dockerfile_copies_changes(
    calls: dict[str, list[Call]], objects: list[Manifest]
) -> None:
    built = {each["ref"]: each for each in all_of(calls["up"], "docker_build")}
    used = {
        container["image"].rpartition(":")[0]
        for each in objects
        if each["kind"] in WORKLOADS
        for container in each["spec"]["template"]["spec"]["containers"]
    }
    assert built.keys() == {f"flashsale/{name}" for name in DEPLOYABLES}
    assert built.keys() <= used
    for name, folder in DEPLOYABLES.items():
        build = built[f"flashsale/{name}"]
        assert build["dockerfile"] == f"{folder}/Dockerfile"
        text = (ROOT / build["dockerfile"]).read_text()
        for copied in re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE):
            assert any(copied.startswith(only) for only in build["only"]), copied


def test_every_workload_object_and_dependency_in_the_tiltfile_exists(
    calls: dict[str, list[Call]], objects: list[Manifest]
) -> None:
    workloads = {each["metadata"]["name"]: each for each in objects if each["kind"] in WORKLOADS}
    names = Counter(f"{each['metadata']['name']}:{each['kind'].lower()}" for each in objects)
    resources = set(workloads)
    for called in (*all_of(calls["up"], "k8s_resource"), *all_of(calls["up"], "local_resource")):
        if "workload" in called:
            assert called["workload"] in workloads
        else:
            resources.add(called.get("name") or called["new_name"])
        for selector in called.get("objects", []):
            assert names[selector] == 1, selector
    for called in (*all_of(calls["ci"], "k8s_resource"), *all_of(calls["ci"], "local_resource")):
        assert set(called.get("resource_deps", [])) <= resources, called


def test_forwarded_ports_are_container_ports_and_do_not_collide(
    calls: dict[str, list[Call]], objects: list[Manifest]
) -> None:
    pods = {
        each["metadata"]["name"]: each["spec"]["template"]["spec"]
        for each in objects
        if each["kind"] in WORKLOADS
    }
    taken: list[str] = ["8080"]  # the API's node port
    for called in all_of(calls["up"], "k8s_resource"):
        if "port_forwards" not in called:
            continue
        here, _, there = called["port_forwards"].partition(":")
        (container,) = pods[called["workload"]]["containers"]
        assert int(there or here) in {port["containerPort"] for port in container["ports"]}
        taken.append(here)
    assert len(taken) == len(set(taken)) > 1


def test_the_stampede_and_the_audit_are_manual_except_in_tilt_ci(
    calls: dict[str, list[Call]],
) -> None:
    for command, automatic in (("up", False), ("ci", True)):
        found = {each["name"]: each for each in all_of(calls[command], "local_resource")}
        for name in ("stampede", "audit"):
            assert found[name]["auto_init"] is automatic
            assert found[name]["trigger_mode"] == "manual"
        assert ("stampede" in found["audit"]["resource_deps"]) is automatic
        script = ROOT / found["stampede"]["cmd"]
        assert script.stat().st_mode & 0o111
        assert found["audit"]["cmd"][-2:] == ["flashsalectl", "audit"]
        assert ">/app/bin/flashsalectl" in (ROOT / "operator" / "Dockerfile").read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("dokcer_build('a', '.')", "undefined: dokcer_build"),
        ("docker_build('a', '.', dokcerfile='b')", "unexpected keyword argument"),
        ("docker_build('a', '.', dockerfile=1)", "dockerfile is int, expected string"),
        ("k8s_resource(resource_deps='redis')", "resource_deps is string, expected list"),
        ("config.tilt_sub", "has no .tilt_sub"),
    ],
)
def test_the_check_finds_a_mistake_in_a_tiltfile(
    calls: dict[str, list[Call]], tmp_path: Path, line: str, message: str
) -> None:
    assert calls
    (tmp_path / "Tiltfile").write_text(f"{line}\n")
    with pytest.raises(Refused, match=re.escape(message)):
        checked("tiltfile", str(tmp_path / "Tiltfile"), "up")
