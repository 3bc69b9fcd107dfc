"""The operator's process: wrong settings, and the single name of the API group."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flashsale import settings
from flashsale.errors import SettingsError
from flashsale_operator.sales import manifest
from flashsale_operator.settings import Settings
from tests.support.paths import ROOT

FILES = ROOT / "charts" / "flashsale" / "files"
GOOD = {
    "FLASHSALE_REDIS_URL": "redis://127.0.0.1:1/0",
    "FLASHSALE_KAFKA_BOOTSTRAP": "127.0.0.1:1",
    "FLASHSALE_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none",
    "FLASHSALE_LISTEN": "127.0.0.1:1",
}


def run(
    folder: Path, *arguments: str, **environment: str | None
) -> subprocess.CompletedProcess[str]:
    own = {**GOOD, "HOME": str(folder), "PATH": os.environ["PATH"], **environment}
    return subprocess.run(
        [sys.executable, "-m", "flashsale_operator", *arguments],
        env={name: value for name, value in own.items() if value is not None},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_help_names_every_setting(tmp_path: Path) -> None:
    done = run(tmp_path, "--help", FLASHSALE_REDIS_URL=None)
    assert done.returncode == 0
    for name in Settings.__struct_fields__:
        assert f"FLASHSALE_{name.upper()}" in done.stdout


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FLASHSALE_REDIS_URL": None}, "FLASHSALE_REDIS_URL is not set"),
        ({"FLASHSALE_LISTEN": "here"}, "FLASHSALE_LISTEN is wrong"),
        ({"FLASHSALE_NAMESPACES": "SimulatedShop"}, "FLASHSALE_NAMESPACES is wrong"),
        ({"FLASHSALE_ITEMS": "shop"}, "FLASHSALE_ITEMS is wrong: expected NAMESPACE=PREFIX"),
        ({"FLASHSALE_ITEMS": "shop=a,shop=b"}, "FLASHSALE_ITEMS is wrong: a namespace appears"),
        ({}, "KUBECONFIG is not set"),
        ({"KUBECONFIG": "/nowhere"}, "KUBECONFIG is wrong"),
        ({"KUBECONFIG": "broken"}, "KUBECONFIG is wrong"),
        ({"KUBECONFIG": "empty"}, "KUBECONFIG is wrong"),
        ({"KUBECONFIG": "elsewhere"}, "KUBECONFIG is wrong"),
        ({"KUBECONFIG": "."}, "KUBECONFIG is wrong"),
        ({"KUBECONFIG": "deep"}, "KUBECONFIG is wrong"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    tmp_path: Path, environment: dict[str, str | None], message: str
) -> None:
    (tmp_path / "broken").write_text("{")
    (tmp_path / "empty").write_text("")
    (tmp_path / "deep").write_text("[" * 3000)
    (tmp_path / "elsewhere").write_text("current-context: gone\n")
    if (name := environment.get("KUBECONFIG")) is not None:
        environment["KUBECONFIG"] = str(tmp_path / name)
    done = run(tmp_path, **environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("token", ["secret: x", '"secret', "*secret", "@secret"])
def test_a_line_about_a_kubeconfig_shows_no_part_of_it(tmp_path: Path, token: str) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(f"users:\n- name: a\n  user:\n    token: {token}\n")
    done = run(tmp_path, KUBECONFIG=str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"KUBECONFIG is wrong: not YAML in line [45]\n", done.stderr)


@pytest.mark.parametrize(
    ("cluster", "user", "named"),
    [
        ({"certificate-authority-data": "abc"}, {}, "certificate-authority-data: "),
        ({"certificate-authority-data": "bm90IFBFTQ=="}, {}, "certificate-authority-data: "),
        ({"certificate-authority-data": "//8="}, {}, "certificate-authority-data: "),
        ({"certificate-authority-data": 5}, {}, "certificate-authority-data: "),
        ({"certificate-authority": "/nowhere"}, {}, "certificate-authority: "),
        ({"certificate-authority": "/dev/null"}, {}, "certificate-authority: "),
        ({"certificate-authority": "/"}, {}, "certificate-authority: "),
        (
            {},
            {"client-certificate-data": "abc", "client-key-data": "bm90IFBFTQ=="},
            "client-certificate-data, client-key-data: ",
        ),
        (
            {},
            {"client-certificate": "/nowhere", "client-key": "/dev/null"},
            "client-certificate, client-key: ",
        ),
        ({"server": None}, {}, "expected https://host:port as the server"),
        ({"server": "kubernetes:6443"}, {}, "expected https://host:port as the server"),
        ({"server": "https://kubernetes:port"}, {}, "expected https://host:port as the server"),
        ({"server": "https:///k8s"}, {}, "expected https://host:port as the server"),
        ({"proxy-url": 5}, {}, "expected https://host:port as the proxy-url"),
        ({"proxy-url": "proxy"}, {}, "expected https://host:port as the proxy-url"),
        ({}, {"username": "a:b", "password": "c"}, "expected a username without : "),
        ({}, {"username": 5, "password": "c"}, "expected a username without : "),
    ],
    ids=str,
)
def test_a_wrong_value_in_a_kubeconfig_is_named_in_one_line(
    tmp_path: Path, cluster: dict[str, object], user: dict[str, object], named: str
) -> None:
    kubeconfig = {
        "current-context": "a",
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": "a"}}],
        "clusters": [{"name": "a", "cluster": {"server": "https://127.0.0.1:1", **cluster}}],
        "users": [{"name": "a", "user": user}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(kubeconfig))
    done = run(tmp_path, KUBECONFIG=str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("KUBECONFIG is wrong: expected")
    assert named in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("given", "served"), [("", ()), ("shop", ("shop",)), ("yard,shop,yard", ("shop", "yard"))]
)
def test_namespaces_are_sorted_and_unique(given: str, served: tuple[str, ...]) -> None:
    own = settings.load(Settings, {**GOOD, "FLASHSALE_NAMESPACES": given})
    assert own.served == served


@pytest.mark.parametrize(
    ("given", "prefixes"),
    [("", {}), ("shop=shop-", {"shop": "shop-"}), ("a=A.~,2=2_", {"a": "A.~", "2": "2_"})],
)
def test_items_are_prefixes_by_namespace(given: str, prefixes: dict[str, str]) -> None:
    assert settings.load(Settings, {**GOOD, "FLASHSALE_ITEMS": given}).prefixes == prefixes


@pytest.mark.parametrize("given", ["shop,", ",", "a b", "shop, yard", "a.b", "-a"])
def test_a_wrong_list_of_namespaces_is_refused(given: str) -> None:
    with pytest.raises(SettingsError, match="FLASHSALE_NAMESPACES is wrong"):
        settings.load(Settings, {**GOOD, "FLASHSALE_NAMESPACES": given})


def test_the_crd_and_the_rules_use_the_group_of_the_constant() -> None:
    crd = yaml.safe_load((FILES / "crd.yaml").read_text())
    assert crd["metadata"]["name"] == f"{manifest.PLURAL}.{manifest.GROUP}"
    assert crd["spec"]["group"] == manifest.GROUP
    assert crd["spec"]["names"]["kind"] == manifest.KIND
    assert [version["name"] for version in crd["spec"]["versions"]] == [manifest.VERSION]
    rules = yaml.safe_load((FILES / "operator-rules.yaml").read_text())
    groups = {group for rule in rules["namespaced"] for group in rule["apiGroups"]}
    assert groups == {manifest.GROUP, ""}
