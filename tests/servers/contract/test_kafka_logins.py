"""Clients log in to a real Kafka with each mechanism, and with a client certificate."""

import asyncio
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import pytest
import trustme
from aiokafka import AIOKafkaProducer
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.errors import KafkaError, NodeNotReadyError
from aiokafka.protocol.metadata import MetadataRequest
from confluent_kafka import admin as kafka_admin
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from dev.stack.ports import free_port
from dev.stack.servers import KafkaServer
from flashsale import kafka_clients
from flashsale.settings import KafkaSettings, load
from tests.support.topics import create_topic

pytestmark = pytest.mark.slow

PASSWORD: Final = "a-password-of-this-test"
_LOGIN: Final = "org.apache.kafka.common.security"


@dataclass(frozen=True, slots=True)
class Broker:
    """The addresses of a broker's two listeners, and the PEM files for them."""

    with_users: str
    with_certificates: str
    authority: Path
    certificate: Path
    key: Path

    @classmethod
    def of(cls, folder: Path) -> Self:
        files = [folder / name for name in ("ca.crt", "tls.crt", "tls.key")]
        return cls(f"127.0.0.1:{free_port()}", f"127.0.0.1:{free_port()}", *files)

    @property
    def keystore(self) -> Path:
        return self.key.with_name("keystore.pem")

    def issue(self) -> None:
        """Write the files of a new authority."""
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1")
        authority.cert_pem.write_to_path(self.authority)
        issued.cert_chain_pems[0].write_to_path(self.certificate)
        issued.private_key_pem.write_to_path(self.key)
        # Kafka reads only keys in PKCS#8.
        key = load_pem_private_key(issued.private_key_pem.bytes(), None)
        pkcs8 = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        self.keystore.write_bytes(pkcs8 + issued.cert_chain_pems[0].bytes())

    def certificates(self) -> dict[str, str]:
        """Return the broker's settings for the listener that requires certificates."""
        given = {
            "keystore.type": "PEM",
            "keystore.location": str(self.keystore),
            "truststore.type": "PEM",
            "truststore.location": str(self.authority),
            "client.auth": "required",
        }
        return {f"listener.name.certificates.ssl.{name}": value for name, value in given.items()}


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    found = Broker.of(tmp_path_factory.mktemp("certificates"))
    found.issue()
    server = KafkaServer(tmp_path_factory.mktemp("kafka"))
    given = server.settings()
    added = f"USERS://{found.with_users},CERTIFICATES://{found.with_certificates}"
    server.options |= {
        "listeners": f"{given['listeners']},{added}",
        "advertised.listeners": f"{given['advertised.listeners']},{added}",
        "listener.security.protocol.map": f"{given['listener.security.protocol.map']},"
        "USERS:SASL_PLAINTEXT,CERTIFICATES:SSL",
        "sasl.enabled.mechanisms": "SCRAM-SHA-512,SCRAM-SHA-256,PLAIN",
        **{
            f"listener.name.users.scram-sha-{bits}.sasl.jaas.config": (
                f"{_LOGIN}.scram.ScramLoginModule required;"
            )
            for bits in (256, 512)
        },
        "listener.name.users.plain.sasl.jaas.config": (
            f'{_LOGIN}.plain.PlainLoginModule required user_plain="{PASSWORD}";'
        ),
        **found.certificates(),
    }
    with server:
        owner = kafka_admin.AdminClient({"bootstrap.servers": server.bootstrap})
        made = owner.alter_user_scram_credentials(
            [
                kafka_admin.UserScramCredentialUpsertion(
                    f"scram-{bits}",
                    kafka_admin.ScramCredentialInfo(mechanism, 4096),
                    PASSWORD.encode(),
                )
                for bits, mechanism in (
                    (256, kafka_admin.ScramMechanism.SCRAM_SHA_256),
                    (512, kafka_admin.ScramMechanism.SCRAM_SHA_512),
                )
            ]
        )
        for future in made.values():
            future.result(timeout=30)
        del owner  # closes its connections
        yield found


def user(broker: Broker, name: str, mechanism: str, password: str = PASSWORD) -> KafkaSettings:
    variables = {
        "FLASHSALE_KAFKA_BOOTSTRAP": broker.with_users,
        "FLASHSALE_KAFKA_SASL_MECHANISM": mechanism,
        "FLASHSALE_KAFKA_USER": name,
        "FLASHSALE_KAFKA_PASSWORD": password,
    }
    return load(KafkaSettings, variables)


def certified(broker: Broker, **more: str) -> KafkaSettings:
    variables = {
        "FLASHSALE_KAFKA_BOOTSTRAP": broker.with_certificates,
        "FLASHSALE_KAFKA_TLS": "true",
        "FLASHSALE_KAFKA_CA_FILE": str(broker.authority),
        **more,
    }
    return load(KafkaSettings, variables)


async def connect(kafka: KafkaSettings) -> None:
    """Connect and ask for metadata. Raises `KafkaError` if the broker refuses the client."""
    kafka_clients.adapt_aiokafka()
    producer = AIOKafkaProducer(**kafka.kafka_client())
    try:
        await producer.start()
    finally:
        await producer.stop()


@pytest.mark.parametrize(
    ("name", "mechanism"),
    [("scram-512", "SCRAM-SHA-512"), ("scram-256", "SCRAM-SHA-256"), ("plain", "PLAIN")],
)
# aiokafka leaves the socket of a refused connection to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_user_logs_in_with_its_own_mechanism_and_password_only(
    broker: Broker, name: str, mechanism: str
) -> None:
    await connect(user(broker, name, mechanism))
    with pytest.raises(KafkaError, match=f"{broker.with_users}: .*AuthenticationFailed"):
        await connect(user(broker, name, mechanism, "another"))
    other = "PLAIN" if mechanism != "PLAIN" else "SCRAM-SHA-512"
    with pytest.raises(KafkaError, match="AuthenticationFailed"):
        await connect(user(broker, name, other))
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_the_error_of_a_client_that_no_broker_serves_has_the_cause(
    broker: Broker, tmp_path: Path
) -> None:
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.crt")
    with pytest.raises(KafkaError, match=f"{broker.with_certificates}: .*CERTIFICATE_VERIFY_FAIL"):
        await connect(certified(broker, FLASHSALE_KAFKA_CA_FILE=str(tmp_path / "other.crt")))
    with pytest.raises(KafkaError, match="ConnectionResetError"):
        await connect(certified(broker, FLASHSALE_KAFKA_BOOTSTRAP=broker.with_users))
    with pytest.raises(KafkaError, match=f"{broker.with_users}: no answer to the first"):
        await connect(KafkaSettings(kafka_bootstrap=broker.with_users))
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_the_error_of_a_broker_that_refuses_a_running_client_has_the_cause(
    broker: Broker, tmp_path: Path
) -> None:
    trusted = tmp_path / "ca.crt"
    trusted.write_bytes(broker.authority.read_bytes())
    files = {
        "FLASHSALE_KAFKA_CA_FILE": str(trusted),
        "FLASHSALE_KAFKA_CERT_FILE": str(broker.certificate),
        "FLASHSALE_KAFKA_KEY_FILE": str(broker.key),
    }
    kafka_clients.adapt_aiokafka()
    client = AIOKafkaClient(**certified(broker, **files).kafka_client())
    await client.bootstrap()
    trustme.CA().cert_pem.write_to_path(trusted)
    cause = f"{broker.with_certificates}: .*CERTIFICATE_VERIFY_FAIL"
    with pytest.raises(NodeNotReadyError, match=cause):
        await client.send(1, MetadataRequest([]), group=ConnectionGroup.COORDINATION)
    await client.close()
    gc.collect()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_broker_that_requires_certificates_admits_a_client_with_its_own(
    broker: Broker,
) -> None:
    files = {
        "FLASHSALE_KAFKA_CERT_FILE": str(broker.certificate),
        "FLASHSALE_KAFKA_KEY_FILE": str(broker.key),
    }
    await connect(certified(broker, **files))
    with pytest.raises(KafkaError):
        await connect(certified(broker))
    gc.collect()


async def test_a_client_goes_on_with_renewed_certificates(tmp_path: Path) -> None:
    """Both sides get certificates of another authority, and the client is not made again."""
    broker = Broker.of(tmp_path)
    broker.issue()
    server = KafkaServer(tmp_path / "kafka")
    given = server.settings()
    added = f",CERTIFICATES://{broker.with_certificates}"
    server.options |= {
        "listeners": given["listeners"] + added,
        "advertised.listeners": given["advertised.listeners"] + added,
        "listener.security.protocol.map": f"{given['listener.security.protocol.map']},"
        "CERTIFICATES:SSL",
        **broker.certificates(),
    }
    kafka_clients.adapt_aiokafka()
    with server:
        await create_topic(server.bootstrap, "renewed", 1)
        files = {
            "FLASHSALE_KAFKA_CERT_FILE": str(broker.certificate),
            "FLASHSALE_KAFKA_KEY_FILE": str(broker.key),
        }
        async with AIOKafkaProducer(**certified(broker, **files).kafka_client()) as producer:
            await producer.send_and_wait("renewed", b"before")
            server.stop()
            broker.issue()
            server.start()
            await asyncio.wait_for(producer.send_and_wait("renewed", b"after"), 60)
