"""A sale on a real cluster from `kubectl apply` to SoldOut, and the limits of pods and accounts."""

import json

import yaml

from dev import debian
from tests.e2e.shop import NAMESPACE, RELEASE, Shop, block, commands
from tests.support.paths import CHART_FILES

OPERATOR = f"{RELEASE}-flashsale-operator"


def test_a_stampede_buys_exactly_the_stock(shop: Shop) -> None:
    for command in commands("sell"):
        print(shop.shell(command))
    promises = shop.end_load("loadtest")
    assert len(promises) == 100
    shop.check("iphone-15", 100, promises)
    shop.until_sale("iphone-15", "SoldOut")
    shop.until(lambda: shop.audit().splitlines()[1].endswith("ok"), "the audit reports ok")


def test_helm_test_buys_one_unit_and_leaves_nothing(shop: Shop) -> None:
    output = shop.helm("test", RELEASE, "--timeout=2m")
    assert "Failed" not in output
    assert "helm-test" not in shop.kubectl("get", "fs,pods", "--output=name")


def test_the_namespace_refuses_an_unrestricted_pod(shop: Shop) -> None:
    output = shop.kubectl("run", "unrestricted", "--image=redis:8.2", check=False)
    assert 'violates PodSecurity "restricted:latest"' in output


def test_the_operator_has_only_the_permissions_of_the_chart(shop: Shop) -> None:
    deployment = shop.get("deployment", OPERATOR)
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    rules = yaml.safe_load((CHART_FILES / "operator-rules.yaml").read_text())
    role = shop.get("role", OPERATOR)
    assert role["rules"] == rules["namespaced"]
    binding = shop.get("rolebinding", OPERATOR)
    assert [each["name"] for each in binding["subjects"]] == [account]

    def may(*request: str) -> bool:
        user = f"--as=system:serviceaccount:{NAMESPACE}:{account}"
        return shop.kubectl("auth", "can-i", *request, user, check=False).startswith("yes")

    assert may("patch", "flashsales", "--subresource=status")
    assert not may("patch", "flashsales")
    assert not may("get", "secrets")
    assert not may("list", "flashsales", "--all-namespaces")


def test_pods_run_unprivileged_on_a_read_only_root_without_build_tools(shop: Shop) -> None:
    for component in ("api", "consumer", "operator"):
        pod = f"deployment/{RELEASE}-flashsale-{component}"
        assert shop.kubectl("exec", pod, "--", "id", "-u").strip() == "65532"
        output = shop.kubectl("exec", pod, "--", "touch", "/app/new", check=False)
        assert "Read-only file system" in output
        for tool in ("pip", "ensurepip"):
            output = shop.kubectl("exec", pod, "--", "python3", "-m", tool, check=False)
            assert f"No module named {tool}" in output
        for program in ("cc", "gcc", "uv"):
            output = shop.kubectl("exec", pod, "--", "which", program, check=False)
            assert "exit code 1" in output


def test_a_sale_is_closed_while_no_operator_runs(shop: Shop) -> None:
    item, api = "closed-by-hand", f"{RELEASE}-flashsale-api"
    debian.require({"jq": "jq"}, "the command that closes a sale without an operator")
    shop.declare(item, stock=5)
    url = f"http://{api}/sales"
    read = f"import urllib.request; print(urllib.request.urlopen('{url}').read().decode())"

    def states() -> dict[str, str]:
        shown = shop.kubectl("exec", f"deployment/{api}", "--", "python3", "-c", read)
        return {each["itemId"]: each["state"] for each in json.loads(shown)["sales"]}

    shop.until(lambda: states()[item] == "Selling", f"buyers see that {item} sells")
    shop.kubectl("scale", f"deployment/{OPERATOR}", "--replicas=0")
    try:
        shop.until(lambda: not shop.pods("operator"), "no operator runs")
        shop.shell(block("close without the operator", "operations").replace("ITEM", item))
        shop.until(lambda: states()[item] == "Closing", f"buyers see that {item} is closed")
        shop.kubectl("delete", "fs", item)
    finally:
        shop.kubectl("scale", f"deployment/{OPERATOR}", "--replicas=1")
        shop.roll_out("operator")
    shop.agrees()
