"""Settings from the environment are typed, and one line names a wrong variable."""

from pathlib import Path

import msgspec
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from flashsale.errors import SettingsError
from flashsale.settings import (
    DatabaseUrl,
    KafkaBootstrap,
    KafkaSettings,
    Listen,
    RedisUrl,
    host_and_port,
    load,
)


class Everything(msgspec.Struct, frozen=True):
    redis_url: RedisUrl
    kafka_bootstrap: KafkaBootstrap
    database_url: DatabaseUrl
    listen: Listen = "0.0.0.0:8080"


GOOD = {
    "FLASHSALE_REDIS_URL": "redis://127.0.0.1:6379/0",
    "FLASHSALE_KAFKA_BOOTSTRAP": "127.0.0.1:9092",
    "FLASHSALE_DATABASE_URL": "postgresql://u:p@127.0.0.1:5432/db",
}


def test_unset_variables_have_defaults_and_unknown_variables_are_ignored() -> None:
    settings = load(Everything, GOOD | {"FLASHSALE_API_URL": "x", "HOME": "/"})
    assert msgspec.structs.astuple(settings) == (*GOOD.values(), "0.0.0.0:8080")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FLASHSALE_REDIS_URL", "rediss://user:p%40ss@redis.example.com:6380/3"),
        ("FLASHSALE_REDIS_URL", "redis://redis"),
        ("FLASHSALE_REDIS_URL", "redis://[::1]:6379"),
        ("FLASHSALE_REDIS_URL", "redis://redis:6379/"),
        ("FLASHSALE_REDIS_URL", "redis://redis:6379?db=3"),
        ("FLASHSALE_KAFKA_BOOTSTRAP", "a:9092,b.example.com:9093"),
        ("FLASHSALE_KAFKA_BOOTSTRAP", "[::1]:9092,[fe80::2]:9092"),
        ("FLASHSALE_DATABASE_URL", "postgres://db/flashsale?sslmode=require"),
        ("FLASHSALE_DATABASE_URL", "postgresql:///flashsale?host=%2Frun%2Fpostgresql"),
        ("FLASHSALE_DATABASE_URL", "postgresql://u:p@[::1]:5432/db?options=-c+search_path%3Dshop"),
        ("FLASHSALE_DATABASE_URL", "postgresql://u:p@a:5432,b:5433/db"),
        ("FLASHSALE_DATABASE_URL", f"postgresql://u:p@%2F{'a' * 64}/db"),
        ("FLASHSALE_DATABASE_URL", f"postgresql:///db?host=%2F{'a' * 64}"),
        ("FLASHSALE_LISTEN", "[::]:80"),
        ("FLASHSALE_LISTEN", "localhost:65535"),
    ],
)
def test_a_valid_value_is_accepted(variable: str, value: str) -> None:
    settings = load(Everything, GOOD | {variable: value})
    assert value in msgspec.structs.astuple(settings)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("FLASHSALE_REDIS_URL", ""),
        ("FLASHSALE_REDIS_URL", "redis://"),
        ("FLASHSALE_REDIS_URL", "redis://h:port"),
        ("FLASHSALE_REDIS_URL", "redis://h:70000"),
        ("FLASHSALE_REDIS_URL", "redis://u:secret@h/zero"),
        ("FLASHSALE_REDIS_URL", "redis://u:secret@h 0"),
        ("FLASHSALE_KAFKA_BOOTSTRAP", ""),
        ("FLASHSALE_KAFKA_BOOTSTRAP", "kafka"),
        ("FLASHSALE_KAFKA_BOOTSTRAP", "kafka:9092 other:9092"),
        ("FLASHSALE_DATABASE_URL", "mysql://u:secret@h/db"),
        ("FLASHSALE_DATABASE_URL", "postgresql://u:secret@h:port/db"),
        ("FLASHSALE_LISTEN", "8080"),
        ("FLASHSALE_LISTEN", "0.0.0.0:"),
        ("FLASHSALE_LISTEN", "::1:80"),
        ("FLASHSALE_LISTEN", f"{'a' * 64}:80"),
        ("FLASHSALE_KAFKA_BOOTSTRAP", "a:9092,b..c:9092"),
        ("FLASHSALE_REDIS_URL", f"redis://u:secret@{'a' * 64}/0"),
        ("FLASHSALE_DATABASE_URL", "postgresql://u:secret@a,b..c/db"),
        ("FLASHSALE_DATABASE_URL", "postgresql://u:secret@/db?host=b..c"),
        ("FLASHSALE_DATABASE_URL", "postgresql://u:secret\udcff@h/db"),
    ],
)
def test_an_error_names_the_wrong_variable_without_its_value(variable: str, value: str) -> None:
    with pytest.raises(SettingsError) as wrong:
        load(Everything, GOOD | {variable: value})
    text = str(wrong.value)
    assert text.startswith(f"{variable} is wrong: expected ")
    assert "\n" not in text
    assert "secret" not in text


@pytest.mark.parametrize("variable", sorted(GOOD))
def test_an_error_names_a_missing_variable(variable: str) -> None:
    with pytest.raises(SettingsError, match=f"^{variable} is not set: expected "):
        load(Everything, {name: value for name, value in GOOD.items() if name != variable})


def test_a_listen_address_is_split_into_host_and_port() -> None:
    assert host_and_port("0.0.0.0:8080") == ("0.0.0.0", 8080)
    assert host_and_port("[::1]:80") == ("::1", 80)


def kafka(**given: str) -> KafkaSettings:
    """Loads the settings from one FLASHSALE_KAFKA_… variable per keyword."""
    named = {f"FLASHSALE_KAFKA_{name.upper()}": value for name, value in given.items()}
    return load(KafkaSettings, {"FLASHSALE_KAFKA_BOOTSTRAP": "a:1,b:2", **named})


@pytest.mark.parametrize(
    ("given", "protocol", "keys"),
    [
        ({}, "PLAINTEXT", set()),
        ({"tls": "false"}, "PLAINTEXT", set()),
        ({"tls": "true"}, "SSL", {"ssl_context"}),
        ({"user": "u", "password": "p"}, "SASL_PLAINTEXT", {"sasl_mechanism"}),
        ({"tls": "true", "user": "u", "password": "p"}, "SASL_SSL", {"ssl_context"}),
        *(
            (
                {"user": "u", "password": "p", "sasl_mechanism": mechanism},
                "SASL_PLAINTEXT",
                {"sasl_mechanism"},
            )
            for mechanism in ("SCRAM-SHA-256", "SCRAM-SHA-512", "PLAIN")
        ),
    ],
)
def test_kafka_clients_use_the_configured_protocol(
    given: dict[str, str], protocol: str, keys: set[str]
) -> None:
    client = kafka(**given).kafka_client()
    assert client["bootstrap_servers"] == "a:1,b:2"
    assert client["security_protocol"] == protocol
    assert keys <= client.keys()
    assert ("ssl_context" in client) == ("SSL" in protocol.replace("SASL", ""))
    if "user" in given:
        assert client["sasl_mechanism"] == given.get("sasl_mechanism", "SCRAM-SHA-512")
        assert (client["sasl_plain_username"], client["sasl_plain_password"]) == ("u", "p")
    else:
        assert "sasl_mechanism" not in client


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tls": "yes please"}, "FLASHSALE_KAFKA_TLS is wrong: expected true or false"),
        ({"user": "u"}, "FLASHSALE_KAFKA_USER is set, but FLASHSALE_KAFKA_PASSWORD is not"),
        (
            {"password": "s3cret"},
            "FLASHSALE_KAFKA_PASSWORD is set, but FLASHSALE_KAFKA_USER is not",
        ),
        ({"ca_file": "x"}, "FLASHSALE_KAFKA_CA_FILE needs FLASHSALE_KAFKA_TLS=true"),
        (
            {"cert_file": "x", "key_file": "x"},
            "FLASHSALE_KAFKA_CERT_FILE needs FLASHSALE_KAFKA_TLS=true",
        ),
        (
            {"tls": "true", "cert_file": "x"},
            "FLASHSALE_KAFKA_CERT_FILE is set, but FLASHSALE_KAFKA_KEY_FILE is not",
        ),
        (
            {"tls": "true", "key_file": "x"},
            "FLASHSALE_KAFKA_KEY_FILE is set, but FLASHSALE_KAFKA_CERT_FILE is not",
        ),
        (
            {"sasl_mechanism": "GSSAPI"},
            "FLASHSALE_KAFKA_SASL_MECHANISM is wrong: expected SCRAM-SHA-512, SCRAM-SHA-256 or",
        ),
    ],
)
def test_inconsistent_kafka_settings_are_refused(given: dict[str, str], words: str) -> None:
    with pytest.raises(SettingsError) as refused:
        kafka(**given)
    assert words in str(refused.value)
    assert "s3cret" not in str(refused.value)


def test_an_unreadable_certificate_file_is_refused(tmp_path: Path) -> None:
    wrong = tmp_path / "ca.crt"
    for _ in range(2):
        with pytest.raises(SettingsError, match="FLASHSALE_KAFKA_CA_FILE is wrong: expected"):
            kafka(tls="true", ca_file=str(wrong))
        wrong.write_text("no certificate")


def test_an_unusable_client_certificate_is_refused(tmp_path: Path) -> None:
    authority, other = trustme.CA(), trustme.CA()
    issued = authority.issue_cert("api.example")
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    certificate.write_bytes(issued.cert_chain_pems[0].bytes())
    private_key = load_pem_private_key(issued.private_key_pem.bytes(), None)
    encrypted = private_key.private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"s3cret")
    )
    keys = {
        "of another certificate": other.issue_cert("api.example").private_key_pem.bytes(),
        "encrypted": encrypted,
        "not in PEM": b"no key",
    }
    for wrong in keys.values():
        key.write_bytes(wrong)
        with pytest.raises(SettingsError, match="KAFKA_KEY_FILE is wrong: expected a certificate"):
            kafka(tls="true", cert_file=str(certificate), key_file=str(key))
    key.write_bytes(issued.private_key_pem.bytes())
    assert kafka(tls="true", cert_file=str(certificate), key_file=str(key))
