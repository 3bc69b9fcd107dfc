"""A sale on a real cluster, from `kubectl apply` to SoldOut, and what the cluster forbids."""

import yaml

from tests.e2e.shop import CHART, NAMESPACE, RELEASE, Shop, commands, eventually

OPERATOR = f"{RELEASE}-flashsale-operator"


def test_a_stampede_buys_exactly_the_stock(shop: Shop) -> None:
    for command in commands("sell"):
        print(shop.shell(command))
    promises = shop.end_load("loadtest")
    assert len(promises) == 100
    shop.check("iphone-15", 100, promises)
    shop.until_sale("iphone-15", "SoldOut")
    eventually("the audit finds them to agree", lambda: shop.audit().splitlines()[1].endswith("ok"))


def test_helm_test_buys_one_unit_and_leaves_nothing(shop: Shop) -> None:
    said = shop.helm("test", RELEASE, "--timeout=2m")
    assert "Failed" not in said
    assert "helm-test" not in shop.kubectl("get", "fs,pods", "--output=name")


def test_the_namespace_admits_no_pod_that_is_not_restricted(shop: Shop) -> None:
    said = shop.kubectl("run", "anybody", "--image=redis:8.0", check=False)
    assert 'violates PodSecurity "restricted:latest"' in said


def test_the_operator_may_do_what_the_chart_says_and_no_more(shop: Shop) -> None:
    deployment = shop.get("deployment", OPERATOR)
    account = deployment["spec"]["template"]["spec"]["serviceAccountName"]
    rules = yaml.safe_load((CHART / "files" / "operator-rules.yaml").read_text())
    role = shop.get("role", OPERATOR)
    assert role["rules"] == rules["namespaced"]
    binding = shop.get("rolebinding", OPERATOR)
    assert [each["name"] for each in binding["subjects"]] == [account]

    def may(*what: str) -> bool:
        who = f"--as=system:serviceaccount:{NAMESPACE}:{account}"
        return shop.kubectl("auth", "can-i", *what, who, check=False).startswith("yes")

    assert may("patch", "flashsales", "--subresource=status")
    assert not may("patch", "flashsales")
    assert not may("get", "secrets")
    assert not may("list", "flashsales", "--all-namespaces")


def test_pods_run_as_nobody_on_a_root_that_they_cannot_write(shop: Shop) -> None:
    for component in ("api", "consumer", "operator"):
        pod = f"deployment/{RELEASE}-flashsale-{component}"
        assert shop.kubectl("exec", pod, "--", "id", "-u").strip() == "65532"
        said = shop.kubectl("exec", pod, "--", "touch", "/app/new", check=False)
        assert "Read-only file system" in said
        for tool in ("pip", "ensurepip"):
            said = shop.kubectl("exec", pod, "--", "python3", "-m", tool, check=False)
            assert f"No module named {tool}" in said
        for program in ("cc", "gcc", "uv"):
            said = shop.kubectl("exec", pod, "--", "which", program, check=False)
            assert "exit code 1" in said
