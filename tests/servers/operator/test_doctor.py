"""`flashsalectl doctor` on real servers, healthy and not."""

import asyncio
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import asyncpg
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from redis import Redis
from redis.asyncio import Redis as AsyncRedis

from dev.stack.servers import KafkaServer, RedisCluster, RedisServer
from flashsale import events, keys, ledger, redis_facts, requirements, schema
from flashsale.errors import RedisUnavailable
from flashsale.inventory import Inventory
from flashsale.requirements import RedisFacts
from flashsale.settings import KafkaSettings
from flashsale_consumer import topics
from flashsale_operator.ctl import doctor
from flashsale_operator.ctl.commands import run
from tests.support.consumer import Log
from tests.support.eventually import until
from tests.support.redis_clusters import refused_by_one
from tests.support.redis_users import OPERATOR, url_of

NOT_KUBERNETES = "the answer is not the kube-apiserver's"

Doctor = Callable[..., tuple[int, dict[str, str]]]


@pytest.fixture
def environ(
    redis_server: RedisServer, kafka_server: KafkaServer, database_url: str
) -> dict[str, str]:
    log = Log(kafka_server.bootstrap)
    return {
        "FLASHSALE_REDIS_URL": url_of(redis_server, OPERATOR),
        "FLASHSALE_KAFKA_BOOTSTRAP": kafka_server.bootstrap,
        "FLASHSALE_DATABASE_URL": database_url,
        "FLASHSALE_ENGINE": log.engine,
    }


@pytest.fixture
def examined(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Doctor:
    """Return a function that runs the doctor. It returns the exit code and verdicts by text."""
    monkeypatch.setattr(doctor, "_has_kubeconfig", lambda _: False)

    def call(**changes: str) -> tuple[int, dict[str, str]]:
        code = run(["doctor", "-o", "json"], environ | changes)
        printed = capsys.readouterr()
        assert printed.err == ""
        found = {f"{each['server']}: {each['text']}": each for each in json.loads(printed.out)}
        return code, {text: each["verdict"] for text, each in found.items()}

    return call


def bad(verdicts: dict[str, str], verdict: str = "failure") -> list[str]:
    """Return the texts with this verdict. A busy machine's slow round trips do not count."""
    slow = "a round trip takes"
    return [text for text, found in verdicts.items() if found == verdict and slow not in text]


@contextmanager
def configured(server: RedisServer, name: str, value: str) -> Iterator[None]:
    """Give a setting of the server another value for a while."""
    client = Redis.from_url(server.url)
    before = str(client.config_get(name)[name])
    client.config_set(name, value)
    try:
        yield
    finally:
        client.config_set(name, before)


@pytest.fixture
def prepared(environ: dict[str, str]) -> None:
    """A ledger and a topic, as a consumer makes them."""

    async def prepare() -> None:
        pool = await ledger.connect(environ["FLASHSALE_DATABASE_URL"])
        await schema.migrate(pool)
        await pool.close()
        log = Log(environ["FLASHSALE_KAFKA_BOOTSTRAP"], environ["FLASHSALE_ENGINE"])
        await log.create()
        kafka = KafkaSettings(kafka_bootstrap=log.bootstrap, engine=log.engine)
        # The broker can show a new topic a moment after its creation.
        await until(lambda: topics.create_recorded(kafka))

    asyncio.run(prepare())


@pytest.mark.usefixtures("prepared")
def test_healthy_servers_pass_every_check_and_keep_nothing(
    examined: Doctor, redis_server: RedisServer
) -> None:
    client = Redis.from_url(redis_server.url)
    before = client.dbsize()
    code, verdicts = examined()
    assert code == 0
    assert bad(verdicts) == bad(verdicts, "warning") == []
    assert client.dbsize() == before
    text = "\n".join(verdicts)
    for words in ("a script can write", "a transaction can write", "clock differs", "brokers: 1"):
        assert words in text
    for table in (
        requirements.REDIS,
        requirements.LEDGER,
        requirements.topic(),
        requirements.RECORDED,
    ):
        for requirement in table:
            line = f"{requirement.server}: {requirement.rule}"
            assert (line in verdicts) is (requirement.server != "Redis Cluster")


def test_an_empty_database_and_a_missing_topic_are_warnings(examined: Doctor) -> None:
    code, verdicts = examined()
    assert code == 0
    [topic, recorded, migrations] = bad(verdicts, "warning")
    assert ".reservations does not exist" in topic
    assert ".recorded does not exist" in recorded
    assert "the ledger lacks migrations" in migrations


@pytest.mark.usefixtures("prepared")
def test_each_server_that_is_away_is_one_failure(examined: Doctor) -> None:
    code, verdicts = examined(
        FLASHSALE_REDIS_URL="redis://:s3cret@127.0.0.1:1/0",
        FLASHSALE_KAFKA_BOOTSTRAP="127.0.0.1:1",
        FLASHSALE_DATABASE_URL="postgresql://u:s3cret@127.0.0.1:1/db",
    )
    assert code == 1
    redis, kafka, postgresql = bad(verdicts)
    assert redis.startswith("Redis: ")
    assert "rediss:// for TLS" in redis
    assert re.match(r"Kafka: .*127\.0\.0\.1:1: \[Errno 111\].*certificates", kafka)
    assert re.match("PostgreSQL: .*certificates", postgresql)
    assert not [text for text in verdicts if "s3cret" in text or "\n" in text]


@pytest.mark.usefixtures("prepared")
def test_a_requirement_that_a_server_lacks_is_a_failure_with_its_remedy(
    examined: Doctor, redis_server: RedisServer
) -> None:
    with configured(redis_server, "maxmemory-policy", "allkeys-lru"):
        code, verdicts = examined()
    assert code == 1
    [failure] = bad(verdicts)
    assert "run CONFIG SET maxmemory-policy noeviction" in failure


@pytest.mark.usefixtures("prepared")
def test_a_server_that_is_too_old_for_the_other_checks_is_one_failure(
    examined: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = redis_facts.read

    async def old(client: AsyncRedis, engine: str) -> list[RedisFacts]:
        [found] = await read(client, engine)
        return [replace(found, version="6.2.14", script_error="")]

    async def refuse(_: Inventory) -> None:
        raise RedisUnavailable("Redis refused the call: syntax error")

    monkeypatch.setattr(redis_facts, "read", old)
    monkeypatch.setattr(Inventory, "server", refuse)
    code, verdicts = examined()
    assert code == 1
    [failure] = bad(verdicts)
    assert "Redis has version 6.2.14, but needs version 7.0" in failure
    assert "Redis: a script can write keys of this engine" in verdicts


@pytest.mark.usefixtures("prepared")
def test_users_without_the_rights_are_failures(
    examined: Doctor, redis_server: RedisServer, environ: dict[str, str]
) -> None:
    client = Redis.from_url(redis_server.url)
    client.acl_setuser(
        "reader", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-hset"]
    )

    async def read_only(value: str) -> None:
        connection = await asyncpg.connect(environ["FLASHSALE_DATABASE_URL"])
        name = await connection.fetchval("SELECT current_database()")
        await connection.execute(
            f'ALTER DATABASE "{name}" SET default_transaction_read_only = {value}'
        )
        await connection.close()

    asyncio.run(read_only("on"))
    try:
        url = redis_server.url.replace("redis://", "redis://reader:secret@")
        code, verdicts = examined(FLASHSALE_REDIS_URL=url)
    finally:
        client.acl_deluser("reader")
    assert code == 1
    [script, transaction] = bad(verdicts)
    assert script.startswith("Redis: a script cannot write")
    assert script.endswith(": allow this user the commands of k8s/redis")
    assert transaction.startswith("PostgreSQL: a transaction cannot write")


@pytest.mark.usefixtures("prepared")
def test_settings_that_cannot_be_read_are_not_confirmed(
    examined: Doctor, redis_cluster: RedisCluster
) -> None:
    clients = [Redis.from_url(server.url) for server in redis_cluster.servers]
    for client in clients:
        client.acl_setuser(
            "guest", enabled=True, passwords=["+secret"], keys=["*"], commands=["+@all", "-config"]
        )
    try:
        url = redis_cluster.url.replace("redis://", "redis://guest:secret@")
        code, verdicts = examined(FLASHSALE_REDIS_URL=url)
    finally:
        for client in clients:
            client.acl_deluser("guest")
    assert code == 0
    hidden = (
        "repl-backlog-ttl",
        "cluster-node-timeout",
        "cluster-require-full-coverage",
        "cluster-allow-reads-when-down",
        "min-replicas-to-write",
    )
    warnings = bad(verdicts, "warning")
    assert len(warnings) == len(hidden)
    for text, name in zip(warnings, hidden, strict=True):
        assert f": needs {name} " in text


@pytest.mark.usefixtures("prepared")
def test_a_primary_that_cannot_be_reached_is_a_failure_with_its_cause(
    examined: Doctor, redis_cluster: RedisCluster
) -> None:
    with refused_by_one(redis_cluster) as (url, name):
        code, verdicts = examined(FLASHSALE_REDIS_URL=url)
    assert code == 1
    # The script's key can be on this primary, too.
    [failure] = [text for text in bad(verdicts) if "its sales stop" in text]
    assert re.match(f"Redis: {name} does not answer, .*invalid username-password pair", failure)


@pytest.mark.usefixtures("prepared")
def test_a_full_redis_is_a_failure_that_no_right_would_end(
    examined: Doctor, redis_server: RedisServer
) -> None:
    with configured(redis_server, "maxmemory", "1"):
        code, verdicts = examined()
    assert code == 1
    [failure] = bad(verdicts)
    assert failure.startswith("Redis: a script cannot write: Redis refused the call: ")
    assert "memory" in failure
    assert "allow this user" not in failure


@pytest.mark.usefixtures("prepared")
def test_a_clock_that_differs_and_a_slow_server_are_warnings(
    examined: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CLOCK_SECONDS", -1.0)
    monkeypatch.setattr(doctor, "SLOW_MS", 0.0)
    code, verdicts = examined()
    assert code == 0
    warnings = [text for text, verdict in verdicts.items() if verdict == "warning"]
    assert len([text for text in warnings if "synchronize both clocks by NTP" in text]) == 2
    assert len([text for text in warnings if "place the engine close to the server" in text]) == 2


@pytest.mark.usefixtures("prepared")
def test_a_late_reply_does_not_count_as_a_clock_that_differs(
    examined: Doctor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CLOCK_SECONDS", 0.2)

    def delay(owner: type, name: str) -> None:
        call = getattr(owner, name)

        async def late(*arguments: object) -> object:
            reply = await call(*arguments)
            await asyncio.sleep(0.3)
            return reply

        monkeypatch.setattr(owner, name, late)

    delay(Inventory, "clocks")
    delay(asyncpg.Pool, "fetchval")
    code, verdicts = examined()
    assert code == 0
    assert bad(verdicts, "warning") == []


@pytest.mark.usefixtures("prepared")
def test_a_ledger_of_another_engine_is_a_failure(examined: Doctor, environ: dict[str, str]) -> None:
    async def claim() -> None:
        pool = await ledger.connect(environ["FLASHSALE_DATABASE_URL"])
        await ledger.engine_id(pool, "brand")
        await pool.close()

    asyncio.run(claim())
    code, verdicts = examined()
    assert code == 1
    [failure] = bad(verdicts)
    assert failure.endswith("belongs to the engine brand: set FLASHSALE_ENGINE=brand")


@pytest.mark.usefixtures("prepared")
def test_a_new_ledger_next_to_the_former_redis_and_group_is_two_failures(
    examined: Doctor, environ: dict[str, str], redis_server: RedisServer
) -> None:
    """Every process refuses to work, because a pod made the ledger in an empty database."""
    engine, group = environ["FLASHSALE_ENGINE"], events.consumer_group(environ["FLASHSALE_ENGINE"])
    topic = TopicPartition(events.topic(engine), 0)

    async def claim() -> None:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=environ["FLASHSALE_KAFKA_BOOTSTRAP"],
            group_id=group,
            enable_auto_commit=False,
        )
        await consumer.start()
        consumer.assign([topic])
        await consumer.commit({topic: (0, events.owner_metadata("former"))})
        await consumer.stop()

    asyncio.run(claim())
    client = Redis.from_url(redis_server.url)
    client.set(keys.engine_id(engine), "former")
    try:
        code, verdicts = examined()
    finally:
        client.delete(keys.engine_id(engine))
    assert code == 1
    in_redis, in_kafka = bad(verdicts)
    assert "this Redis belongs to engine former, and the ledger to engine" in in_redis
    assert "empty this Redis if engine former is gone" in in_redis
    assert f"the consumer group {group} belongs to engine former, and the ledger to" in in_kafka


@pytest.mark.usefixtures("prepared")
def test_a_redis_that_the_sales_are_not_in_is_a_failure(
    examined: Doctor, environ: dict[str, str]
) -> None:
    async def move() -> None:
        pool = await ledger.connect(environ["FLASHSALE_DATABASE_URL"])
        await ledger.adopt_redis(pool, "former:6379/0")
        await pool.close()

    asyncio.run(move())
    code, verdicts = examined()
    assert code == 1
    [failure] = bad(verdicts)
    assert "the sales are in the Redis at former:6379/0, and not at 127.0.0.1:" in failure


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ("echo 'Hello!'", NOT_KUBERNETES),
        ("echo '[]'", NOT_KUBERNETES),
        (r"""printf '{"resources": [{"kind": "\377"}]}'""", NOT_KUBERNETES),
        ("""echo '{"resources": [5]}'""", NOT_KUBERNETES),
        ("exec sleep 600", "kubectl gave no answer within 1 s"),
        ("cat; echo asked >&2; exit 1", "asked"),
    ],
)
def test_a_kubectl_that_does_not_work_is_one_failure(
    examined: Doctor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, why: str
) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"#!/bin/sh\n{script}\n")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(doctor, "_has_kubeconfig", lambda _: True)
    if "sleep" in script:
        monkeypatch.setattr(doctor, "KUBECTL_SECONDS", 1.0)
    code, verdicts = examined()
    assert code == 1
    assert bad(verdicts) == [f"Kubernetes: {why}: check the address, the network and the user"]


@pytest.mark.usefixtures("prepared")
def test_the_table_has_one_line_per_check(
    environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor"], environ) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["VERDICT", "SERVER", "CHECK"]
    assert {line.split()[0] for line in lines} <= {"ok", "warning"}
    assert {line.split()[1] for line in lines} == {"Redis", "Kafka", "PostgreSQL", "Kubernetes"}
