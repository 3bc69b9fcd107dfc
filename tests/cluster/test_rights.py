"""The operator has exactly the rights in the chart's rules file."""

import json
from pathlib import Path
from typing import Any

import pytest

from dev.cluster.control_plane import ControlPlane
from tests.support.cluster import World, rules
from tests.support.eventually import eventually

pytestmark = pytest.mark.slow

Grants = set[tuple[str, str, str]]


def grants(listed: list[dict[str, Any]]) -> Grants:
    """Return (API group, resource, verb) for everything that the rules allow."""
    return {
        (group, resource, verb)
        for rule in listed
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def reviewed(plane: ControlPlane, namespace: str, account: Path) -> Grants:
    """Return the rights of an account in a namespace, as the kube-apiserver lists them."""
    asked = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    done = plane.kubectl(
        "create",
        "--validate=false",
        "--filename=-",
        "--output=json",
        stdin=json.dumps(asked),
        kubeconfig=account,
        check=True,
    )
    status = json.loads(done.stdout)["status"]
    assert not status["incomplete"]
    return grants(status["resourceRules"])


@pytest.fixture
def plain_account(plane: ControlPlane, namespace: str) -> Path:
    """The kubeconfig of an account without a role. It has only the rights of all accounts."""
    plane.kubectl("create", "serviceaccount", "plain", "-n", namespace, check=True)
    return plane.kubeconfig_for_service_account(namespace, "plain")


def test_in_one_namespace_the_operator_has_the_namespaced_rights(
    plane: ControlPlane, namespace: str, service_account: Path, plain_account: Path
) -> None:
    own = reviewed(plane, namespace, service_account) - reviewed(plane, namespace, plain_account)
    assert own == grants(rules()["namespaced"])
    elsewhere = reviewed(plane, "default", service_account)
    assert elsewhere == reviewed(plane, "default", plain_account)


def test_in_all_namespaces_the_operator_has_both_sets_of_rights(
    plane: ControlPlane, namespace: str, cluster_account: Path, plain_account: Path
) -> None:
    for place in (namespace, "default"):
        own = reviewed(plane, place, cluster_account) - reviewed(plane, place, plain_account)
        assert own == grants(rules()["namespaced"]) | grants(rules()["cluster"])


def test_other_requests_of_the_operator_are_refused(world: World) -> None:
    world.apply("mine")
    for refused in (
        ("delete", "fs", "mine"),
        ("patch", "fs", "mine", "--type=merge", "-p", '{"spec":{"stock":5}}'),
        ("get", "events"),
        ("get", "secrets"),
        ("get", "configmaps"),
        ("get", "pods"),
        ("get", "fs", "-n", "default"),
        ("get", "namespaces"),
        ("get", "crds"),
    ):
        # The kubeconfig names the namespace.
        done = world.plane.kubectl(*refused, kubeconfig=world.kubeconfig)
        assert (done.returncode, "(Forbidden)" in done.stderr) == (1, True), refused


def test_one_operator_serves_all_namespaces(world: World, cluster_account: Path) -> None:
    world.kubeconfig = cluster_account
    operator = world.operator(FLASHSALE_NAMESPACES="")
    world.kubectl("create", "namespace", f"{world.namespace}-2")
    elsewhere = World(**{**vars(world), "namespace": f"{world.namespace}-2", "services": []})
    for number, each in enumerate((world, elsewhere)):
        each.apply("shared-name", item=f"item-{number}")
        each.until("shared-name", state="Selling", ready="Applied")
    elsewhere.delete("shared-name")
    assert elsewhere.sale("item-0")["state"] == "open"
    assert 'flashsale_operator_sales{state="Unknown"} 0.0' in operator.get("/metrics")
    assert "Forbidden" not in operator.log.read_text()


def test_a_sale_is_reported_by_an_account_that_may_create_no_events(world: World) -> None:
    without = [rule for rule in rules()["namespaced"] if rule["resources"] != ["events"]]
    patch = json.dumps({"rules": without})
    world.kubectl("patch", "role", "flashsale-operator", "--type=merge", "--patch", patch)
    operator = world.operator()
    world.apply("silent")
    world.until("silent", state="Selling", ready="Applied")
    world.patch("silent", paused=True)
    world.until("silent", state="Paused", ready="Applied")
    assert world.events("silent") == []
    world.delete("silent")
    eventually(lambda: world.sale("silent")["state"] == "closed")
    eventually(lambda: 'flashsale_operator_sales{state="Paused"} 0.0' in operator.get("/metrics"))
    assert "no Event Opened" in operator.log.read_text()
