"""The engine as k8s/values/highly-available.yaml sets it up: TLS everywhere, and users of Kafka.

Kafka is a real broker with an authorizer, and its users and their rights are those of
k8s/kafka/three-brokers.yaml. Redis and PostgreSQL come from wheels without TLS, so it ends at a
relay in front of them: what is tried here are the engine's clients.
"""

import asyncio
import gc
import json
import os
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError, TopicAuthorizationFailedError
from confluent_kafka import admin as kafka_admin

from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.ports import free_port
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from flashsale import events
from flashsale.settings import KafkaSettings, load
from flashsale_consumer import topics
from flashsale_consumer.worker import GROUP_ID
from flashsale_operator.sales import offsets
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow

MANIFESTS: Final = ROOT / "k8s/kafka/three-brokers.yaml"
PASSWORD: Final = "a password of this test"
SSL_REQUEST: Final = bytes.fromhex("0000000804d2162f")
"""How a client of PostgreSQL asks for TLS."""


@dataclass(frozen=True, slots=True)
class Authority:
    """Certificates for 127.0.0.1."""

    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "Authority":
        folder.mkdir()
        made = cls(folder)
        common = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2")
        made._openssl(
            "req", "-x509", *common, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=a"
        )
        made._openssl(
            "req", *common[:-2], "-keyout", "key.pem", "-out", "csr.pem", "-subj", "/CN=b"
        )
        (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
        made._openssl(
            *("x509", "-req", "-in", "csr.pem", "-CA", "ca.crt", "-CAkey", "ca.key"),
            *("-CAcreateserial", "-days", "2", "-extfile", "names", "-out", "cert.pem"),
        )
        (folder / "both.pem").write_text(
            (folder / "key.pem").read_text() + (folder / "cert.pem").read_text()
        )
        return made

    @property
    def trusted(self) -> str:
        return str(self.folder / "ca.crt")

    @property
    def server(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "cert.pem", self.folder / "key.pem")
        return context

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=self.folder, check=True, capture_output=True)


@asynccontextmanager
async def relay(port: int, context: ssl.SSLContext, *, asked: bool) -> AsyncIterator[int]:
    """A port where TLS ends that is spoken at once or, with `asked`, as PostgreSQL does it."""

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
    """The ACLs of each, as Strimzi is told them."""
    return {
        each["metadata"]["name"]: each["spec"]["authorization"]["acls"]
        for each in yaml.safe_load_all(MANIFESTS.read_text())
        if each["kind"] == "KafkaUser"
    }


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority.make(tmp_path_factory.mktemp("authority") / "made")


@pytest.fixture(scope="module")
def kafka(tmp_path_factory: pytest.TempPathFactory, authority: Authority) -> Iterator[str]:
    """A broker with the topics; its plain port is its owner's, the other one the users'."""
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
        "listener.name.scram.ssl.keystore.location": str(authority.folder / "both.pem"),
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
        # Strimzi's topic operator makes the topics; no user here may.
        owned = KafkaSettings(kafka_bootstrap=server.bootstrap)
        asyncio.run(topics.create(owned, events.TOPIC, events.DEAD_LETTER_TOPIC))
        del owner  # and its connections
        yield secured


def acls() -> list[kafka_admin.AclBinding]:
    """What Strimzi's user operator makes of the users."""
    kinds = {"topic": kafka_admin.ResourceType.TOPIC, "group": kafka_admin.ResourceType.GROUP}
    return [
        kafka_admin.AclBinding(
            kinds[acl["resource"]["type"]],
            acl["resource"]["name"],
            kafka_admin.ResourcePatternType.LITERAL,
            f"User:{user}",
            "*",
            kafka_admin.AclOperation[operation.upper()],
            kafka_admin.AclPermissionType.ALLOW,
        )
        for user, given in users().items()
        for acl in given
        for operation in acl["operations"]
    ]


def as_user(component: str, bootstrap: str, authority: Authority) -> dict[str, str]:
    """A component's variables, as the chart sets them."""
    return {
        "FLASHSALE_KAFKA_BOOTSTRAP": bootstrap,
        "FLASHSALE_KAFKA_TLS": "true",
        "FLASHSALE_KAFKA_CA_FILE": authority.trusted,
        "FLASHSALE_KAFKA_USER": f"flashsale-{component}",
        "FLASHSALE_KAFKA_PASSWORD": PASSWORD,
        "SSL_CERT_FILE": authority.trusted,
        "PGSSLROOTCERT": authority.trusted,
    }


async def test_a_reservation_goes_all_the_way_over_tls_as_users_with_the_least_rights(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    authority: Authority,
    kafka: str,
    redis_server: RedisServer,
    postgres_server: PostgresServer,
    database_url: str,
    item: str,
) -> None:
    async with AsyncExitStack() as stack:
        redis_port, database_port = [
            await stack.enter_async_context(relay(port, authority.server, asked=asked))
            for port, asked in ((redis_server.port, False), (postgres_server.port, True))
        ]
        database = database_url.replace(f":{postgres_server.port}/", f":{database_port}/")
        addresses = Addresses(
            f"rediss://127.0.0.1:{redis_port}/0", kafka, f"{database}?sslmode=verify-full"
        )

        def be(component: str) -> None:
            for name, value in as_user(component, kafka, authority).items():
                monkeypatch.setenv(name, value)

        async def ctl(*arguments: str, manifest: str = "") -> str:
            """As the operator, whose code it is."""
            be("operator")

            def run() -> subprocess.CompletedProcess[str]:
                return subprocess.run(
                    [Path(sys.executable).with_name("flashsalectl"), *arguments],
                    input=manifest,
                    env={**os.environ, **addresses.environment()},
                    capture_output=True,
                    text=True,
                    timeout=120,
                    check=False,
                )

            done = await asyncio.to_thread(run)
            assert done.returncode == 0, done.stderr + done.stdout
            return done.stdout

        manifest = {
            "apiVersion": "flashsale.dev/v1alpha1",
            "kind": "FlashSale",
            "metadata": {"name": item},
            "spec": {"itemId": item, "stock": 1},
        }
        await ctl("apply", "-f", "-", manifest=json.dumps(manifest))
        with ExitStack() as processes:
            consumer = ConsumerServer(tmp_path / "consumer", addresses)
            api = ApiServer(tmp_path / "api", addresses)
            for component, server in (("consumer", consumer), ("api", api)):
                be(component)
                await asyncio.to_thread(server.start)  # the relays go on meanwhile
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
            async with asyncio.timeout(60):
                while "ok" not in (said := await _audit(ctl, item)):
                    await asyncio.sleep(0.5)
            assert said.split()[-7:] == ["SoldOut", "1", "1", "1", "0", "0", "ok"]


async def _audit(ctl: Any, item: str) -> str:  # noqa: ANN401 - a function of the test's
    try:
        said: str = await ctl("audit", item)
    except AssertionError as disagreement:
        return str(disagreement)
    return said


def client(
    component: str, bootstrap: str, authority: Authority, password: str = PASSWORD
) -> KafkaSettings:
    variables = as_user(component, bootstrap, authority) | {"FLASHSALE_KAFKA_PASSWORD": password}
    return load(KafkaSettings, variables)


async def test_each_user_may_do_its_own_and_nothing_else(authority: Authority, kafka: str) -> None:
    operator = client("operator", kafka, authority)
    before = sum(span.end for span in (await offsets.spans(operator)).values())
    may_write = {
        ("api", events.TOPIC): True,
        ("api", events.DEAD_LETTER_TOPIC): False,
        ("consumer", events.TOPIC): False,
        ("consumer", events.DEAD_LETTER_TOPIC): True,
        ("operator", events.TOPIC): False,
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
    for component, group in (("api", None), ("consumer", GROUP_ID), ("operator", None)):
        reader = AIOKafkaConsumer(
            events.TOPIC,
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
    for component in ("api", "consumer", "operator"):
        admin = AIOKafkaAdminClient(**client(component, kafka, authority).kafka_client())
        await admin.start()
        try:
            reply = await admin.delete_topics([events.TOPIC])
            assert [code for _, code in reply.topic_error_codes] == [
                TopicAuthorizationFailedError.errno
            ]
        finally:
            await admin.close()
    after = sum(span.end for span in (await offsets.spans(operator)).values())
    assert after == before + 1


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
