"""Servers that fail and return without help, and operators that die or run twice."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from dev.cluster.control_plane import ControlPlane
from dev.services import OperatorServer
from dev.stack.servers import KafkaServer, PostgresServer
from flashsale import events
from tests.support.cluster import World, reserve, reserve_until
from tests.support.eventually import eventually
from tests.support.paths import CRD
from tests.support.topics import create_topic

pytestmark = pytest.mark.slow


def test_a_frozen_redis_is_named_and_its_return_does_not_open_the_sale_again(
    world: World, operator: OperatorServer
) -> None:
    world.apply("ice")
    world.until("ice", state="Selling", ready="Applied")
    world.redis.pause()
    world.until("ice", state="Unknown", ready="RedisUnavailable")
    ready = world.condition("ice", "Ready")
    assert (ready["status"], "Redis" in ready["message"]) == ("False", True)
    assert world.condition("ice", "Open")["status"] == "Unknown"
    assert operator.get("/healthz") == "alive\n"
    world.redis.resume()
    world.until("ice", state="Selling", ready="Applied")
    assert world.events("ice") == ["Opened"]
    failures = [line for line in operator.get("/metrics").splitlines() if 'server="redis"' in line]
    assert float(failures[0].split()[1]) >= 1


def test_a_restarted_redis_fences_the_sale_until_it_is_rebuilt(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API, the consumer and the rebuild need it
    world: World,
    operator: OperatorServer,
) -> None:
    api = world.api()
    consumer = world.consumer()
    world.apply("fence", stock=5)
    world.until("fence", state="Selling")
    reserve_until(api, "fence", (202, ""))
    eventually(lambda: world.on_ledger("SELECT accepted FROM sales WHERE item_id = 'fence'") == 1)
    # The rebuild waits until a consumer has read this unit from Kafka.
    consumer.stop()
    reserve_until(api, "fence", (202, ""))
    world.until_published("fence")
    world.redis.stop()
    world.until("fence", ready="RedisUnavailable")
    world.redis.start()
    world.until("fence", state="Fenced", ready="Fenced")
    condition = world.condition("fence", "Open")
    assert condition["status"] == "False"
    assert "being rebuilt from the ledger" in condition["message"]
    assert reserve(api, "fence")[0] == 503
    world.apply("beside", stock=1)
    world.until("beside", state="Selling", ready="Applied")
    consumer.start()
    world.until("fence", state="Selling", ready="Applied")
    world.until_available("fence", 3)
    reserve_until(api, "fence", (202, ""))
    assert world.events("fence") == ["Opened", "Fenced", "Rebuilt", "Opened"]
    assert "flashsale_operator_lost_units_total 0.0" in operator.get("/metrics")


def test_a_sale_whose_keys_are_lost_comes_back_from_the_ledger(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API, the consumer and the rebuild need it
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    api = world.api()
    consumer = world.consumer()
    world.apply("lost", stock=5)
    world.until("lost", state="Selling")
    reserve_until(api, "lost", (202, ""))
    assert reserve(api, "lost", "ada", key="k")[0] == 202
    eventually(lambda: world.on_ledger("SELECT accepted FROM sales WHERE item_id = 'lost'") == 2)
    # The rebuild waits until a consumer has read this unit from Kafka.
    consumer.stop()
    reserve_until(api, "lost", (202, ""))
    world.until_published("lost")
    world.redis.kill()
    for file in world.redis.data.rglob("*"):
        if file.is_file() and ("aof" in file.name or file.suffix == ".rdb"):
            file.unlink()
    world.redis.start()
    world.until("lost", state="Fenced")
    assert reserve(api, "lost")[0] == 503
    consumer.start()
    world.until("lost", state="Selling", ready="Applied")
    world.until_available("lost", 2)
    assert reserve(api, "lost", "ada") == (409, "limit-reached")
    assert reserve(api, "lost", "ada", key="k")[0] == 202
    for _ in range(2):
        reserve_until(api, "lost", (202, ""))
    reserve_until(api, "lost", (409, "sold-out"))
    assert world.events("lost")[:4] == ["Opened", "Fenced", "Rebuilt", "Opened"]


def test_a_fenced_sale_names_a_missing_kafka_and_is_rebuilt_when_it_returns(
    world: World, tmp_path: Path
) -> None:
    kafka = KafkaServer(tmp_path / "kafka")
    world.addresses = replace(world.addresses, kafka_bootstrap=kafka.bootstrap)
    world.operator()
    world.apply("quiet", stock=5)
    world.until("quiet", state="Selling")
    world.redis.restart()
    world.until("quiet", state="Fenced", ready="KafkaUnavailable")
    with kafka:
        topic = events.topic(world.addresses.engine)
        asyncio.run(create_topic(kafka.bootstrap, topic, 1))
        world.until("quiet", state="Selling", ready="Applied")
    assert world.events("quiet") == ["Opened", "Fenced", "Opened"]


def test_a_missing_ledger_is_named_while_buyers_are_served(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API needs it
    world: World,
    tmp_path: Path,
) -> None:
    with PostgresServer(tmp_path / "postgres", durable=False) as postgres:
        world.addresses = replace(world.addresses, database_url=postgres.url)
        world.operator()
        api = world.api()
        world.apply("book", stock=5)
        world.until("book", state="Selling", ready="Applied")
        postgres.kill()
        world.until("book", state="Selling", ready="LedgerUnavailable")
        reserve_until(api, "book", (202, ""))
        world.until_available("book", 4)
        world.apply("new", stock=5)
        world.until("new", state="Unknown", ready="LedgerUnavailable")
        assert world.sale("new") == {}
        postgres.start()
        for name in ("book", "new"):
            world.until(name, state="Selling", ready="Applied")
        assert (world.events("book"), world.events("new")) == (["Opened"], ["Opened"])


def test_a_fenced_sale_is_rebuilt_when_the_ledger_returns(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API, the consumer and the rebuild need it
    world: World,
    tmp_path: Path,
) -> None:
    with PostgresServer(tmp_path / "postgres", durable=False) as postgres:
        world.addresses = replace(world.addresses, database_url=postgres.url)
        world.operator()
        world.consumer()
        api = world.api()
        world.apply("both", stock=5)
        world.until("both", state="Selling", ready="Applied")
        reserve_until(api, "both", (202, ""))
        postgres.kill()
        world.redis.restart()
        world.until("both", state="Fenced", ready="LedgerUnavailable")
        # Until the pod has reconnected, it names Redis.
        reserve_until(api, "both", (503, "fenced"))
        postgres.start()
        world.until("both", state="Selling", ready="Applied")
        # The unit sold just before the outage was still in Kafka or in the outbox.
        world.until_available("both", 4)


def test_an_operator_waits_for_servers_that_start_later(world: World, tmp_path: Path) -> None:
    postgres = PostgresServer(tmp_path / "postgres", durable=False)
    with postgres:
        world.addresses = replace(world.addresses, database_url=postgres.url)
    world.redis.stop()
    world.operator()
    world.apply("early", stock=5)
    world.until("early", state="Unknown", ready="LedgerUnavailable")
    with postgres:
        world.until("early", state="Unknown", ready="RedisUnavailable")
        world.redis.start()
        world.until("early", state="Selling", ready="Applied")
        assert world.events("early") == ["Opened"]


def test_sales_and_the_operator_survive_an_outage_of_the_kube_apiserver(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API needs it
    world: World,
    operator: OperatorServer,
) -> None:
    api = world.api()
    world.apply("calm", stock=5)
    world.until("calm", state="Selling")
    pid = operator.pid
    world.plane.kill()
    reserve_until(api, "calm", (202, ""))
    eventually(lambda: 'failures_total{server="kubernetes"} 0.0' not in operator.get("/metrics"))
    assert operator.get("/healthz") == "alive\n"
    world.plane.start()
    world.until_available("calm", 4)
    world.apply("calm", stock=6)
    world.until_available("calm", 5)
    world.apply("later", stock=1)
    world.until("later", state="Selling", ready="Applied")
    assert operator.pid == pid
    assert world.events("calm") == ["Opened", "Restocked"]


def test_the_operator_survives_a_time_in_which_its_token_is_refused(
    world: World, operator: OperatorServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kube-apiserver restarts with another key for tokens, and then with the right one."""
    world.apply("calm", stock=5)
    world.until("calm", state="Selling")
    pid, plane = operator.pid, world.plane
    pem = generate_private_key(65537, 2048).private_bytes(
        Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption()
    )
    (tmp_path / "other.key").write_bytes(pem)
    other = [
        f"--service-account-key-file={tmp_path}/other.key"
        if argument.startswith("--service-account-key-file=")
        else argument
        for argument in plane._command()
    ]
    plane.stop()
    with monkeypatch.context() as patch:
        patch.setattr(plane, "_command", lambda: other)
        plane.start()
    refused = "refused: 401 Unauthorized"
    eventually(lambda: operator.log.read_text().count(refused) >= 4)
    plane.stop()
    plane.start()
    world.apply("later", stock=1)
    world.until("later", state="Selling", ready="Applied")
    assert operator.pid == pid
    assert '"exception"' not in operator.log.read_text()


def test_the_watch_goes_on_with_a_renewed_authority_of_the_cluster(
    world: World, tmp_path: Path
) -> None:
    with ControlPlane(tmp_path / "plane") as plane:
        plane.kubectl("apply", "-f", str(CRD), check=True)
        plane.kubectl("create", "namespace", world.namespace, check=True)
        world.plane, world.kubeconfig = plane, plane.kubeconfig
        operator = world.operator()
        eventually(lambda: watches(plane))
        plane.stop()
        for file in (plane.data / "pki").iterdir():
            file.unlink()
        plane.start()  # with another authority, which it writes into the kubeconfig
        eventually(lambda: watches(plane), operator.log.read_text)
        world.apply("later", stock=1)
        world.until("later", state="Selling", ready="Applied")
        world.end()


def watches(plane: ControlPlane) -> bool:
    """Return whether a client watches FlashSales."""
    metrics = plane.kubectl("get", "--raw", "/metrics").stdout.splitlines()
    found = [
        float(line.split()[1])
        for line in metrics
        if line.startswith("apiserver_longrunning_requests{")
        and 'resource="flashsales"' in line
        and 'verb="WATCH"' in line
    ]
    return any(found)


def test_an_operator_restart_during_a_sale_neither_creates_nor_loses_units(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API needs it
    world: World,
    operator: OperatorServer,
) -> None:
    api = world.api()
    world.apply("keep", stock=4)
    world.until("keep", state="Selling")
    for _ in range(3):
        reserve_until(api, "keep", (202, ""))
    operator.kill()
    world.apply("keep", stock=5)
    reserve_until(api, "keep", (202, ""))
    operator.start()
    world.until_available("keep", 1)
    world.until("keep", state="Selling", ready="Applied")
    operator.restart()
    reserve_until(api, "keep", (202, ""))
    reserve_until(api, "keep", (409, "sold-out"))
    world.until("keep", state="SoldOut")
    assert (world.sale("keep")["allocated"], world.sale("keep")["accepted"]) == ("5", "5")
    assert world.events("keep") == ["Opened", "Restocked", "SoldOut"]


def test_two_operators_at_once_are_harmless(
    kafka_server: KafkaServer,  # noqa: ARG001 - the API needs it
    world: World,
    operator: OperatorServer,  # noqa: ARG001 - it runs
) -> None:
    world.operator()
    api = world.api()
    names = [f"both-{number}" for number in range(4)]
    for name in names:
        world.apply(name, stock=1)
    for name in names:
        world.until(name, state="Selling", ready="Applied")
        reserve_until(api, name, (202, ""))
        reserve_until(api, name, (409, "sold-out"))
        world.until(name, state="SoldOut")
        world.apply(name, stock=2)
    for name in names:
        reserve_until(api, name, (202, ""))
        world.until(name, state="SoldOut", ready="Applied")
        assert world.sale(name)["accepted"] == "2"
        assert world.events(name) == ["Opened", "SoldOut", "Restocked", "SoldOut"]
        assert world.on_ledger("SELECT count(*) FROM sales WHERE item_id = $1", name) == 1


def test_a_quiet_flashsale_is_not_written_again(world: World, operator: OperatorServer) -> None:
    world.apply("still", stock=4)
    version = world.until("still", state="Selling", ready="Applied")["metadata"]["resourceVersion"]

    def reconciles() -> float:
        lines = operator.get("/metrics").splitlines()
        return next(
            float(line.split()[1])
            for line in lines
            if line.startswith("flashsale_operator_reconciles_total")
        )

    before = reconciles()
    eventually(lambda: reconciles() >= before + 3)
    assert world.get("still")["metadata"]["resourceVersion"] == version
    assert json.loads(world.kubectl("get", "events", "-o", "json"))["items"][1:] == []


def test_drift_in_redis_is_corrected(world: World, operator: OperatorServer) -> None:  # noqa: ARG001
    world.apply("drift", stock=4)
    world.until("drift", state="Selling")
    world.on_ledger(
        "UPDATE sales SET paused = true, revision = revision + 1 WHERE item_id = 'drift'"
    )
    eventually(lambda: world.sale("drift")["revision"] == "3")
    world.until("drift", state="Selling", ready="Applied")
    assert world.sale("drift")["state"] == "open"
