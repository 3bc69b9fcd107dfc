"""The script of `helm test` buys one unit from the real API, consumer and operator.

The operator and the script run with the chart's own service accounts.
"""

import json
import os
import ssl
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar, Final

import asyncpg
import pytest

from dev.cluster.control_plane import ControlPlane
from dev.issuer import Issuer
from dev.services import Addresses, ApiServer, ConsumerServer, OperatorServer
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from tests.support.certificates import ADDRESS, certificate
from tests.support.chart import ADDRESSES, CRD_RESOURCE, Helm, Rendered, at, merged
from tests.support.paths import CHART

pytestmark = pytest.mark.slow


@pytest.fixture
async def database(postgres_server: PostgresServer) -> str:
    name = f"ledger_{uuid.uuid4().hex}"
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(f'CREATE DATABASE "{name}"')
    await admin.close()
    return f"{postgres_server.url.rpartition('/')[0]}/{name}"


@pytest.fixture(params=["body", "header", "token"])
def identity(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The values of `identity`, for each way in which the API knows a buyer."""
    if request.param == "token":
        with Issuer() as issuer:
            keys, names = issuer.settings["FLASHSALE_JWKS_URL"], ("issuer", "audience")
            yield {"jwksUrl": keys} | {
                name: issuer.settings[f"FLASHSALE_JWT_{name.upper()}"] for name in names
            }
    else:
        yield {"userHeader": "x-user-id"} if request.param == "header" else {}


@pytest.fixture
def release(
    chart: Helm, cluster: ControlPlane, namespace: str, identity: dict[str, str]
) -> Iterator[Rendered]:
    """An installed release with the accounts that `helm test` creates for its pod."""
    tenants = at("operator", {"namespaces": [namespace], "items": {namespace: "shop."}})
    values = merged(ADDRESSES, tenants, {"identity": identity})
    command = ("shop", str(CHART), "-n", namespace)
    chart.run("install", *command, values=values, kubeconfig=cluster.kubeconfig)
    cluster.kubectl("wait", "--for=condition=Established", CRD_RESOURCE, check=True)
    rendered = Rendered.of(chart.run("template", *command, values=values))
    accounts = [each for each in rendered.hooks if each["kind"] != "Pod"]
    listed = {"apiVersion": "v1", "kind": "List", "items": accounts}
    cluster.kubectl("apply", "-f", "-", stdin=json.dumps(listed), check=True)
    yield rendered
    chart.run_plain("uninstall", "shop", "-n", namespace, kubeconfig=cluster.kubeconfig)
    cluster.kubectl("delete", CRD_RESOURCE, "--timeout=30s", check=True)


@pytest.fixture
def account(
    cluster: ControlPlane,
    release: Rendered,  # noqa: ARG001 - creates the account
    namespace: str,
    tmp_path: Path,
) -> Path:
    """The account's token and certificate, as they are mounted into a pod."""
    token = cluster.kubectl("create", "token", "shop-flashsale-test", "-n", namespace, check=True)
    (tmp_path / "token").write_text(token.stdout.strip())
    (tmp_path / "ca.crt").write_bytes((cluster.data / "pki/apiserver.crt").read_bytes())
    return tmp_path


SOLD: Final = ["201", "202", "409", "confirmed", "200"]
WITHOUT_A_TOKEN: Final = ["201", "Selling", "401", "200"]


def test_helm_test_buys_one_unit_and_finds_it_in_the_ledger(
    cluster: ControlPlane,
    identity: dict[str, str],
    release: Rendered,
    account: Path,
    namespace: str,
    kafka_server: KafkaServer,
    database: str,
    tmp_path: Path,
) -> None:
    (pod,) = (each for each in release.hooks if each["kind"] == "Pod")
    (container,) = pod["spec"]["containers"]
    given = {each["name"]: each.get("value", "") for each in container["env"]}
    kubeconfig = cluster.kubeconfig_for_service_account(namespace, "shop-flashsale-operator")
    tenants = release.environment("operator")
    about = ("FLASHSALE_USER_HEADER", "FLASHSALE_JWKS_URL", "FLASHSALE_JWT_")
    named = {
        name: value for name, value in release.environment("api").items() if name.startswith(about)
    }
    with RedisServer(tmp_path / "redis") as redis:
        addresses = Addresses(redis.url, kafka_server.bootstrap, database, namespace)
        environment = {
            **addresses.environment(),
            "KUBECONFIG": str(kubeconfig),
            "FLASHSALE_NAMESPACES": tenants["FLASHSALE_NAMESPACES"],
            "FLASHSALE_ITEMS": tenants["FLASHSALE_ITEMS"],
        }
        with (
            OperatorServer(tmp_path / "operator", environment),
            ApiServer(tmp_path / "api", addresses, settings=named) as api,
            ConsumerServer(tmp_path / "consumer", addresses),
        ):
            done = subprocess.run(
                [sys.executable, *container["command"][1:], *container["args"]],
                env={
                    "PATH": os.environ["PATH"],
                    **given,
                    "API": api.url,
                    "FLASHSALE_DATABASE_URL": database,
                    "ACCOUNT": str(account),
                    "KUBERNETES_SERVICE_HOST": "127.0.0.1",
                    "KUBERNETES_SERVICE_PORT": str(cluster.port),
                },
                capture_output=True,
                text=True,
                check=False,
            )
            (doctor,) = pod["spec"]["initContainers"]
            examined = subprocess.run(
                doctor["command"],
                env={
                    "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
                    "HOME": str(tmp_path),
                    **addresses.environment(),
                },
                capture_output=True,
                text=True,
                check=False,
            )
    assert (examined.returncode, examined.stderr) == (0, ""), examined.stdout
    assert (done.returncode, done.stderr) == (0, "")
    steps = [line.rpartition(": ")[2] for line in done.stdout.splitlines()]
    assert steps == (WITHOUT_A_TOKEN if "jwksUrl" in identity else SOLD)
    assert cluster.kubectl("get", "fs", "-n", namespace, "-o", "name").stdout == ""
    assert given["API"] == "http://shop-flashsale-api:80"


class LossyHandler(BaseHTTPRequestHandler):
    """A kube-apiserver and an API. The answers to the first creation and deletion are lost."""

    stored: ClassVar[set[str]] = set()
    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self._answer(200, {"state": "Selling"})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/reserve":
            return self._answer(401, {})
        name = body["metadata"]["name"]
        if name in self.stored:
            return self._answer(409, {"reason": "AlreadyExists"})
        self.stored.add(name)
        return self._lose("POST", 201)

    def do_DELETE(self) -> None:
        name = self.path.rpartition("/")[2]
        if name not in self.stored:
            return self._answer(404, {})
        self.stored.remove(name)
        return self._lose("DELETE", 200)

    def _lose(self, verb: str, status: int) -> None:
        if verb in self.seen:
            return self._answer(status, {})
        self.seen.append(verb)
        self.close_connection = True
        return None

    def _answer(self, status: int, body: object) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


def test_helm_test_repeats_a_creation_and_a_deletion_whose_answers_were_lost(
    tmp_path: Path,
) -> None:
    certificate(tmp_path)
    (tmp_path / "token").write_text("token")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "server.pem")
    with ThreadingHTTPServer((ADDRESS, 0), LossyHandler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever).start()
        port = str(server.server_address[1])
        done = subprocess.run(
            [sys.executable, str(CHART / "files/purchase.py")],
            env={
                "ACCOUNT": str(tmp_path),
                "API": f"https://{ADDRESS}:{port}",
                "KUBERNETES_SERVICE_HOST": ADDRESS,
                "KUBERNETES_SERVICE_PORT": port,
                "NAMESPACE": "sales",
                "NEEDS_TOKEN": "true",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        server.shutdown()
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(LossyHandler.seen) == ["DELETE", "POST"]
    assert LossyHandler.stored == set()
