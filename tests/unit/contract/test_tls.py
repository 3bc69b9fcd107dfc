"""The clients accept certificates that Python 3.13 refuses by default."""

import json
import os
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from inspect import signature
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import trustme
from asyncpg import connect_utils

from dev.issuer import Issuer
from flashsale import redis_client
from flashsale.addresses import database_url
from flashsale.settings import KafkaSettings, load
from flashsale.tls import RenewedContext, stamp
from flashsale.tracing import Tracing
from flashsale_api import tokens
from flashsale_operator.ctl import doctor
from flashsale_operator.kubernetes.client import log_in
from tests.support.certificates import ADDRESS, certificate
from tests.support.paths import CHART


@pytest.fixture
def posted() -> list[str]:
    """The paths of the requests with a body that the server of `port` answers."""
    return []


@pytest.fixture
def port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, posted: list[str]) -> Iterator[int]:
    """The port of a server that has such a certificate. Default contexts are as in Python 3.13."""
    certificate(tmp_path)
    with Issuer() as issuer:
        keys = json.dumps({"keys": list(issuer.published.values())}).encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(keys)

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            posted.append(self.path)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
            pass

    server = ThreadingHTTPServer((ADDRESS, 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    default = ssl.create_default_context

    def strict(*args: object, **options: object) -> ssl.SSLContext:
        context: ssl.SSLContext = default(*args, **options)  # type: ignore[arg-type]
        context.verify_flags |= ssl.VERIFY_X509_STRICT
        return context

    class Strict(ssl.SSLContext):
        def __init__(self, *_: object) -> None:
            self.verify_flags |= ssl.VERIFY_X509_STRICT

    monkeypatch.setattr("urllib3.util.ssl_.SSLContext", Strict)
    monkeypatch.setattr(ssl, "create_default_context", strict)
    monkeypatch.setattr(ssl, "_create_default_https_context", strict)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.crt"))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


def shake_hands(context: ssl.SSLContext, port: int, name: str = ADDRESS) -> None:
    with (
        socket.create_connection((ADDRESS, port), timeout=5) as connection,
        context.wrap_socket(connection, server_hostname=name),
    ):
        pass


def kafka(folder: Path, port: int) -> ssl.SSLContext:
    variables = {"KAFKA_BOOTSTRAP": f"{ADDRESS}:{port}", "KAFKA_TLS": "true"}
    variables["KAFKA_CA_FILE"] = str(folder / "ca.crt")
    given = {f"FLASHSALE_{name}": value for name, value in variables.items()}
    context: ssl.SSLContext = load(KafkaSettings, given).kafka_client()["ssl_context"]
    return context


def redis(folder: Path, port: int) -> ssl.SSLContext:
    client = redis_client.connect(f"rediss://{ADDRESS}:{port}?ssl_ca_certs={folder / 'ca.crt'}")
    other = redis_client.neighbour(client, ADDRESS, port)
    pool: Any = other.connection_pool
    context: ssl.SSLContext = pool.make_connection().ssl_context.get()
    return context


def postgresql(folder: Path, port: int) -> ssl.SSLContext:
    trusted = f"sslmode=verify-full&sslrootcert={folder / 'ca.crt'}"
    url = database_url(f"postgresql://u:p@{ADDRESS}:{port}/db?{trusted}")
    parse = vars(connect_utils)["_parse_connect_dsn_and_args"]
    names = [name for name in signature(parse).parameters if name != "dsn"]
    context: ssl.SSLContext = parse(**dict.fromkeys(names), dsn=url)[1].ssl
    return context


def kubernetes(folder: Path, port: int) -> ssl.SSLContext:
    cluster = {
        "server": f"https://{ADDRESS}:{port}",
        "certificate-authority": str(folder / "ca.crt"),
    }
    config = {
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (folder / "kubeconfig").write_text(json.dumps(config))
    with patch.dict(os.environ, KUBECONFIG=str(folder / "kubeconfig")):
        return log_in().as_ssl_context()


@pytest.mark.parametrize("client", [kafka, redis, postgresql, kubernetes])
def test_a_client_accepts_a_certificate_without_identifiers_of_keys(
    client: Callable[[Path, int], ssl.SSLContext],
    tmp_path: Path,
    port: int,
) -> None:
    with pytest.raises(ssl.SSLCertVerificationError, match="Key Identifier"):
        shake_hands(ssl.create_default_context(), port)
    context = client(tmp_path, port)
    shake_hands(context, port)
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(context, port, "other.example")


def test_the_keys_of_an_issuer_can_be_behind_such_a_certificate(port: int) -> None:
    keys, _ = tokens._read(f"https://{ADDRESS}:{port}/jwks")
    assert len(keys) == 3


def test_doctor_asks_a_cluster_with_such_a_certificate(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("t")
    monkeypatch.setattr(doctor, "ACCOUNT", tmp_path)
    pod = {"KUBERNETES_SERVICE_HOST": ADDRESS, "KUBERNETES_SERVICE_PORT": str(port)}
    answer, _ = doctor._by_account(pod)
    assert len(json.loads(answer)["keys"]) == 3


def test_helm_test_reaches_a_cluster_with_such_a_certificate(
    tmp_path: Path, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("t")
    given = {"ACCOUNT": str(tmp_path), "NAMESPACE": "shop", "KUBERNETES_SERVICE_HOST": ADDRESS}
    for name, value in {**given, "KUBERNETES_SERVICE_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    functions, _, _ = (CHART / "files/purchase.py").read_text().partition("\ntry:\n")
    script: dict[str, Any] = {}
    exec(functions, script)
    status, answer = script["flash_sales"]("GET")
    assert status == 200, answer


def test_a_collector_of_traces_can_have_such_a_certificate(
    tmp_path: Path, port: int, posted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):  # requests prefers them
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"https://{ADDRESS}:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", str(tmp_path / "ca.crt"))
    tracing = Tracing("api", os.environ)
    tracing.tracer.start_span("a request").end()
    tracing.close()
    assert posted == ["/v1/traces"]


def connect(context: ssl.SSLContext) -> None:
    """Begin a connection, which reads renewed certificates."""
    context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_hostname="x")


def test_certificates_that_change_while_they_are_read_are_read_again() -> None:
    files, read = ["first"], []

    def reading() -> ssl.SSLContext:
        read.append(files[-1])
        if files[-1] == "first":
            files.append("second")
        return ssl.create_default_context()

    context = RenewedContext(reading, lambda: files[-1])
    for _ in range(2):
        connect(context)
    assert read == ["first", "second"]


def test_certificates_that_could_not_be_read_are_read_at_the_next_connection() -> None:
    files, wrong, read = ["first"], {"second"}, []

    def reading() -> ssl.SSLContext:
        read.append(files[-1])
        if files[-1] in wrong:
            raise PermissionError(files[-1])
        return ssl.create_default_context()

    context = RenewedContext(reading, lambda: files[-1])
    files.append("second")
    connect(context)
    wrong.clear()
    connect(context)
    assert read == ["first", "second", "second"]


def test_another_file_of_the_same_size_and_time_is_another_stamp(tmp_path: Path) -> None:
    """Kubernetes renews a Secret by a link to other files."""
    link, files = tmp_path / "ca.crt", [tmp_path / "former", tmp_path / "renewed"]
    found = []
    for each in files:
        each.write_text("same size")
        os.utime(each, (1, 1))
        link.unlink(missing_ok=True)
        link.symlink_to(each)
        found.append(stamp([str(link), None]))
    assert found[0] != found[1]


def test_a_client_of_kafka_reads_the_authorities_of_the_system_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted = tmp_path / "authorities.pem"
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    trustme.CA().cert_pem.write_to_path(trusted)
    settings = KafkaSettings(kafka_bootstrap="127.0.0.1:1", kafka_tls=True)
    context = settings.kafka_client()["ssl_context"]
    connect(context)
    former = context._latest.get_ca_certs()
    renewed = tmp_path / "renewed.pem"
    trustme.CA().cert_pem.write_to_path(renewed)
    renewed.replace(trusted)
    connect(context)
    assert context._latest.get_ca_certs() != former
