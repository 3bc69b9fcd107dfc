"""The engine with TLS everywhere and Kafka users, as in k8s/values/highly-available.yaml.

Kafka is a real broker with an authorizer. Its users have the ACLs of k8s/kafka/three-brokers.yaml,
and one has those of docs/runbooks.md for dead letters.
Redis has the users of k8s/redis/one-node.yaml.
Redis and PostgreSQL come from wheels without TLS, so a relay in front of them terminates TLS. These
tests cover the engine's clients.
"""

import asyncio
import gc
import json
import re
import shutil
import ssl
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import pytest
import yaml
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    KafkaError,
    TopicAuthorizationFailedError,
)
from confluent_kafka import admin as kafka_admin
from redis import Redis
from redis.crc import key_slot
from redis.exceptions import ConnectionError as Disconnected

from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.ports import free_port
from dev.stack.servers import KafkaServer, PostgresServer, RedisCluster, RedisServer
from flashsale import events, ledger, redis_client, schema
from flashsale.errors import LedgerUnavailable
from flashsale.inventory import Inventory
from flashsale.keys import ItemKeys
from flashsale.settings import KafkaSettings, load
from flashsale_consumer import topics
from flashsale_operator.ctl import doctor
from flashsale_operator.sales import offsets
from tests.support import redis_users
from tests.support.certificates import certificate
from tests.support.engine import flashsalectl, manifest
from tests.support.eventually import until
from tests.support.inventory import a_request
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

MANIFESTS: Final = ROOT / "k8s/kafka/three-brokers.yaml"
PASSWORD: Final = "a password of this test"
RUNBOOKS: Final = ROOT / "docs/runbooks.md"
READER: Final = "flashsale-reader"
"""The user of a person who reads dead letters."""
SSL_REQUEST: Final = bytes.fromhex("0000000804d2162f")
"""The message with which a PostgreSQL client asks for TLS."""


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate authority, and a certificate for 127.0.0.1."""

    trusted: Path
    """The authority's own certificate, in PEM."""

    keystore: Path
    """The key for 127.0.0.1 in PKCS#8, because Kafka reads no other format, and its certificate."""

    @classmethod
    def make(cls, folder: Path) -> "Authority":
        folder.mkdir()
        made = cls(folder / "ca.crt", folder / "server.pem")
        certificate(folder)
        return made

    @property
    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.keystore)
        return context


@asynccontextmanager
async def relay(port: int, context: ssl.SSLContext, *, asked: bool) -> AsyncIterator[int]:
    """Terminate TLS on a new port, from the first byte or, with `asked`, as PostgreSQL does."""

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.transport.abort()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            if asked:
                assert await reader.readexactly(len(SSL_REQUEST)) == SSL_REQUEST
                writer.write(b"S")
                await writer.start_tls(context)
            behind_reader, behind_writer = await asyncio.open_connection("127.0.0.1", port)
            behind.append(behind_writer)
            await asyncio.gather(pump(reader, behind_writer), pump(behind_reader, writer))

    behind: list[asyncio.StreamWriter] = []
    at_once = None if asked else context
    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=at_once)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in behind:
            writer.transport.abort()


def users() -> dict[str, list[dict[str, Any]]]:
    """Return the ACLs of each Kafka user in the manifests, and of the reader of dead letters."""
    block = RUNBOOKS.read_text().partition("```yaml\nacls:")[2].partition("```")[0]
    return {READER: yaml.safe_load(block)} | {
        each["metadata"]["name"]: each["spec"]["authorization"]["acls"]
        for each in yaml.safe_load_all(MANIFESTS.read_text())
        if each["kind"] == "KafkaUser"
    }


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("authority") / "made")


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[str]:
    """A broker with the topics. Only its owner uses the plain port. Users use this one."""
    secured = f"127.0.0.1:{free_port()}"
    server = KafkaServer(tmp_path_factory.mktemp("kafka"))
    settings = server.settings()
    server.options |= {
        "listeners": f"{settings['listeners']},SCRAM://{secured}",
        "advertised.listeners": f"{settings['advertised.listeners']},SCRAM://{secured}",
        "listener.security.protocol.map": f"{settings['listener.security.protocol.map']},"
        "SCRAM:SASL_SSL",
        "sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.scram.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "listener.name.scram.ssl.keystore.type": "PEM",
        "listener.name.scram.ssl.keystore.location": str(authority.keystore),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }
    with server:
        owner = kafka_admin.AdminClient({"bootstrap.servers": server.bootstrap})
        mechanism = kafka_admin.ScramCredentialInfo(kafka_admin.ScramMechanism.SCRAM_SHA_512, 4096)
        made = owner.alter_user_scram_credentials(
            [
                kafka_admin.UserScramCredentialUpsertion(user, mechanism, PASSWORD.encode())
                for user in users()
            ]
        )
        for future in (*made.values(), *owner.create_acls(acls()).values()):
            future.result(timeout=30)
        # The users may not create topics. Strimzi's topic operator does that.
        owned = KafkaSettings(kafka_bootstrap=server.bootstrap)
        asyncio.run(topics.create(owned))
        asyncio.run(topics.create_recorded(owned))
        del owner  # closes its connections
        yield secured


def acls() -> list[kafka_admin.AclBinding]:
    """Return the ACLs as Strimzi's user operator creates them."""
    kinds = {"topic": kafka_admin.ResourceType.TOPIC, "group": kafka_admin.ResourceType.GROUP}
    patterns = {
        "literal": kafka_admin.ResourcePatternType.LITERAL,
        "prefix": kafka_admin.ResourcePatternType.PREFIXED,
    }
    return [
        kafka_admin.AclBinding(
            kinds[acl["resource"]["type"]],
            acl["resource"]["name"],
            patterns[acl["resource"].get("patternType", "literal")],
            f"User:{user}",
            "*",
            kafka_admin.AclOperation[re.sub("(?<=[a-z])(?=[A-Z])", "_", operation).upper()],
            kafka_admin.AclPermissionType.ALLOW,
        )
        for user, given in users().items()
        for acl in given
        for operation in acl["operations"]
    ]


def as_user(component: str, bootstrap: str, authority: Authority) -> dict[str, str]:
    """Return a component's variables as the chart sets them."""
    return {
        "FLASHSALE_KAFKA_BOOTSTRAP": bootstrap,
        "FLASHSALE_KAFKA_TLS": "true",
        "FLASHSALE_KAFKA_CA_FILE": str(authority.trusted),
        "FLASHSALE_KAFKA_USER": f"flashsale-{component}",
        "FLASHSALE_KAFKA_PASSWORD": PASSWORD,
        "SSL_CERT_FILE": str(authority.trusted),
        "PGSSLROOTCERT": str(authority.trusted),
    }


async def test_a_certificate_of_another_authority_is_an_outage_of_the_ledger(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    authority: Authority,
    postgres_server: PostgresServer,
    database_url: str,
) -> None:
    """It can be renewed, so a process waits for it as for any other outage."""
    other = Authority.make(tmp_path / "other")
    monkeypatch.setenv("PGSSLROOTCERT", str(other.trusted))
    async with relay(postgres_server.port, authority.server, asked=True) as port:
        address = database_url.replace(f":{postgres_server.port}/", f":{port}/")
        pool = await ledger.connect(f"{address}?sslmode=verify-full")
        with pytest.raises(LedgerUnavailable, match="certificate verify failed"):
            await schema.facts(pool)
        pool.terminate()


@pytest.mark.parametrize("renewed", ["ca.crt", "server.pem"])
async def test_a_renewed_certificate_is_used_for_new_connections_to_redis(
    renewed: str, authority: Authority, redis_server: RedisServer, tmp_path: Path
) -> None:
    files = {"ca.crt": authority.trusted, "server.pem": authority.keystore}
    ours = Authority.make(tmp_path / "ours")
    for name, file in files.items():
        if name != renewed:
            shutil.copy(file, tmp_path / "ours" / name)
    server = authority.server
    server.verify_mode = ssl.CERT_REQUIRED
    server.load_verify_locations(authority.trusted)

    async def call(client: Any) -> None:  # noqa: ANN401 - redis-py has no types for it
        await client.ping()
        await (await client.connection_pool.link()).ask("PING")

    async with relay(redis_server.port, server, asked=False) as port:
        options = f"ssl_ca_certs={ours.trusted}&ssl_certfile={ours.keystore}"
        first = redis_client.connect(f"rediss://127.0.0.1:{port}/0?{options}")
        other = redis_client.neighbour(first, "127.0.0.1", port)
        for client in (first, other):
            with pytest.raises(Disconnected):
                await call(client)
        shutil.copy(files[renewed], tmp_path / "ours" / renewed)
        for client in (first, other):
            await call(client)
            await client.aclose()


async def test_a_client_follows_a_slot_of_a_cluster_that_speaks_tls(
    authority: Authority, tmp_path: Path, item: str
) -> None:
    """The nodes announce the ports of their relays."""
    cluster, slot = RedisCluster(tmp_path), key_slot(ItemKeys.of(item).sale.encode())
    async with AsyncExitStack() as stack:
        names: dict[str, RedisServer] = {}
        for server in cluster.servers:
            port = await stack.enter_async_context(
                relay(server.port, authority.server, asked=False)
            )
            names[f"127.0.0.1:{port}"] = server
            server.options = ("--cluster-announce-port", f"{port}")
            stack.callback(server.kill)
            await asyncio.to_thread(server.start)
        await cluster._form()
        address = f"rediss://{next(iter(names))}/0?ssl_ca_certs={authority.trusted}"
        client = redis_client.connect(address)
        stack.push_async_callback(client.aclose)
        inventory = Inventory(client)
        nodes: dict[str, Any] = {name: Redis.from_url(server.url) for name, server in names.items()}
        # One on the link, one in a pipeline, and one on a connection of the pool.
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: inventory.reserve(item, [a_request()], timeout_seconds=5),
            lambda: inventory.sales([item]),
            lambda: inventory.close(item, "default/none", 1),
        ]
        for call in calls:
            await call()
            source = inventory.node_of(item)
            target = next(name for name in names if name != source)
            owner = nodes[target].execute_command("CLUSTER MYID")
            for name in dict.fromkeys((target, source, *names)):
                nodes[name].execute_command("CLUSTER SETSLOT", slot, "NODE", owner)
            await call()
            assert inventory.node_of(item) == target
        for node in nodes.values():
            node.close()


async def test_a_reservation_reaches_the_ledger_over_tls_with_least_privilege_users(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    authority: Authority,
    kafka: str,
    postgres_server: PostgresServer,
    database_url: str,
    item: str,
) -> None:
    async with AsyncExitStack() as stack:
        redis = RedisServer(tmp_path / "redis")
        await asyncio.to_thread(redis.start)
        stack.callback(redis.stop)
        admin = redis_client.connect(redis.url)
        stack.push_async_callback(admin.aclose)
        set_user: Any = admin.execute_command  # redis-py has no types for it
        for user in (redis_users.OPERATOR, redis_users.API):
            rules = redis_users.rules(user, "one-node")
            await set_user("ACL", "SETUSER", user, "on", f">{PASSWORD}", *rules)
        redis_port, database_port = [
            await stack.enter_async_context(relay(port, authority.server, asked=asked))
            for port, asked in ((redis.port, False), (postgres_server.port, True))
        ]
        database = database_url.replace(f":{postgres_server.port}/", f":{database_port}/")
        addresses = Addresses(
            f"rediss://flashsale:{quote(PASSWORD)}@127.0.0.1:{redis_port}/0",
            kafka,
            f"{database}?sslmode=verify-full",
        )

        def run_as(component: str) -> None:
            for name, value in as_user(component, kafka, authority).items():
                monkeypatch.setenv(name, value)

        async def ctl(*arguments: str, stdin: str = "") -> str:
            run_as("operator")
            done = await flashsalectl(addresses, *arguments, stdin=stdin)
            assert done.returncode == 0, done.stderr + done.stdout
            return done.stdout

        await ctl("apply", "-f", "-", stdin=manifest(item, stock=1))
        with ExitStack() as processes:
            consumer = ConsumerServer(tmp_path / "consumer", addresses)
            api = ApiServer(tmp_path / "api", redis_users.of_api(addresses))
            for component, server in (("consumer", consumer), ("api", api)):
                run_as(component)
                await asyncio.to_thread(server.start)  # because the relays need the loop
                processes.callback(server.stop)

            def buy() -> int:
                request = urllib.request.Request(
                    f"{api.url}/reserve",
                    json.dumps({"userId": "user1", "itemId": item, "quantity": 1}).encode(),
                    {"Content-Type": "application/json"},
                )
                with urllib.request.urlopen(request, timeout=10) as answer:
                    return int(answer.status)

            assert await asyncio.to_thread(buy) == 202

            async def audit() -> list[str]:
                return (await ctl("audit", item)).split()[-8:]

            found = await until(audit, "the audit agrees", ignoring=(AssertionError,))
            assert found == ["SoldOut", "1", "1", "0", "1", "0", "0", "ok"]

            await admin.flushall()  # Redis loses the sale, and the operator's user rebuilds it
            assert "rebuilt" in await ctl("apply", "-f", "-", stdin=manifest(item, stock=1))
            assert await audit() == found


def client(
    component: str, bootstrap: str, authority: Authority, password: str = PASSWORD
) -> KafkaSettings:
    variables = as_user(component, bootstrap, authority) | {"FLASHSALE_KAFKA_PASSWORD": password}
    return load(KafkaSettings, variables)


async def test_the_operators_user_may_read_the_settings_that_doctor_checks(
    authority: Authority, kafka: str
) -> None:
    settings = client("operator", kafka, authority)
    found = await doctor._within(doctor.KAFKA, doctor._kafka(settings))
    assert len(found) > 2
    assert not [each for each in found if "this user may not" in each.text]


async def test_each_user_can_do_its_own_work_and_nothing_else(
    authority: Authority, kafka: str
) -> None:
    operator = client("operator", kafka, authority)
    before = sum(span.end for span in (await offsets.spans(operator)).values())
    may_write = {
        ("api", events.topic()): True,
        ("api", events.dead_letter_topic()): False,
        ("consumer", events.topic()): False,
        ("consumer", events.dead_letter_topic()): True,
        ("operator", events.topic()): True,
        ("api", events.recorded_topic()): False,
        ("consumer", events.recorded_topic()): True,
        ("operator", events.recorded_topic()): False,
    }
    for (component, name), allowed in may_write.items():
        producer = AIOKafkaProducer(
            **client(component, kafka, authority).kafka_client(), acks="all"
        )
        await producer.start()
        try:
            await asyncio.wait_for(producer.send_and_wait(name, b"{}"), 60)
            assert allowed, (component, name)
        except TopicAuthorizationFailedError:
            assert not allowed, (component, name)
        finally:
            await producer.stop()
    owned = events.consumer_group()
    for component, group in (("api", None), ("consumer", owned), ("operator", None)):
        reader = AIOKafkaConsumer(
            events.topic(),
            **client(component, kafka, authority).kafka_client(),
            group_id=group,
            auto_offset_reset="earliest",
        )
        try:
            async with asyncio.timeout(60):
                await reader.start()
                await reader.getone()
            assert component == "consumer"
        except TopicAuthorizationFailedError:
            assert component != "consumer"
        finally:
            await reader.stop()
    first = [TopicPartition(events.topic(), 0)]
    for component in ("api", "consumer", "operator"):
        admin = AIOKafkaAdminClient(**client(component, kafka, authority).kafka_client())
        await admin.start()
        try:
            reply = await admin.delete_topics([events.topic()])
            assert [code for _, code in reply.topic_error_codes] == [
                TopicAuthorizationFailedError.errno
            ]
            # Who owns the group is in its offsets.
            committed = await admin.list_consumer_group_offsets(owned, partitions=first)
            assert list(committed) == first
        finally:
            await admin.close()
    for component in ("api", "operator"):
        member = AIOKafkaConsumer(
            **client(component, kafka, authority).kafka_client(),
            group_id=owned,
            enable_auto_commit=False,
        )
        await member.start()
        try:
            member.assign(first)
            with pytest.raises(GroupAuthorizationFailedError):
                await member.commit({first[0]: 0})
        finally:
            await member.stop()
    after = sum(span.end for span in (await offsets.spans(operator)).values())
    assert after == before + 2


async def test_the_user_of_the_runbook_reads_dead_letters_and_publishes_them_again(
    authority: Authority, kafka: str
) -> None:
    own = client("reader", kafka, authority).kafka_client()
    async with AIOKafkaProducer(
        **client("consumer", kafka, authority).kafka_client(), acks="all"
    ) as consumer:
        await consumer.send_and_wait(events.dead_letter_topic(), b"a dead letter")
    async with AIOKafkaConsumer(
        events.dead_letter_topic(),
        **own,
        group_id="console-consumer-1",  # kafka-console-consumer.sh names its group so
        auto_offset_reset="earliest",
    ) as reader:
        async with asyncio.timeout(60):
            while (await reader.getone()).value != b"a dead letter":
                pass
    async with AIOKafkaProducer(**own, acks="all") as producer:
        await asyncio.wait_for(producer.send_and_wait(events.topic(), b"{}"), 60)


# aiokafka leaves the socket of a refused connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_wrong_password_and_an_unknown_authority_are_refused(
    tmp_path: Path, authority: Authority, kafka: str
) -> None:
    other = Authority.make(tmp_path / "other")
    for given in (
        client("api", kafka, authority, "another"),
        client("api", kafka, other),
    ):
        producer = AIOKafkaProducer(**given.kafka_client())
        with pytest.raises(KafkaError):
            await producer.start()
        await producer.stop()
    gc.collect()
