"""Real gateways name the user. Needs nginx of Debian's packages and the wheel of Envoy."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from dev.issuer import Issuer
from dev.services import Addresses, ApiServer
from dev.stack.errors import StackError
from tests.support import gateways
from tests.support.api import OpenSale, problem
from tests.support.gateways import Envoy, Gateway, IngressNginx
from tests.support.paths import ROOT

pytestmark = pytest.mark.slow  # the first run downloads 37 MB


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with Issuer() as found:
        yield found


@pytest.fixture
def login(header: str) -> Iterator[str]:
    """The address of a login, which knows the buyer from a cookie, as oauth2-proxy does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            user = (self.headers["Cookie"] or "").removeprefix("session=")
            self.send_response(202 if user else 401)
            if user not in ("", "anonymous"):
                self.send_header(header, user)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:  # noqa: ANN401 - http.server's signature
            """Write nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/oauth2/auth"
        server.shutdown()
        thread.join()


@pytest.fixture
def header(gateway: str) -> str:
    """The header that the API trusts, from the values of the gateway."""
    values = yaml.safe_load((ROOT / f"k8s/values/{gateway}.yaml").read_text())
    found: str = values["identity"]["userHeader"]
    return found


@pytest.fixture
def api(without_kafka: Addresses, tmp_path: Path, header: str) -> Iterator[ApiServer]:
    settings = {"FLASHSALE_USER_HEADER": header}
    with ApiServer(tmp_path / "api", without_kafka, settings=settings) as server:
        yield server
        server.kill()


@pytest.fixture
def front(
    gateway: str, api: ApiServer, tmp_path: Path, issuer: Issuer, request: pytest.FixtureRequest
) -> Iterator[Gateway]:
    """The gateway in front of the API."""
    try:
        if gateway == "ingress-nginx":
            gateways.nginx()
            login: str = request.getfixturevalue("login")
            made: Gateway = IngressNginx(tmp_path / "gateway", api.port, login)
        else:
            gateways.envoy()
            made = Envoy(tmp_path / "gateway", api.port, issuer.settings, gateway)
    except StackError as error:
        pytest.skip(str(error))
    with made:
        yield made


async def order(
    front: Gateway, item: str, headers: dict[str, str], user: str = ""
) -> httpx.Response:
    body = {"itemId": item, "quantity": 1} | ({"userId": user} if user else {})
    async with httpx.AsyncClient(base_url=front.url, timeout=30) as http:
        return await http.post("/reserve", json=body, headers=headers)


async def read(front: Gateway, path: str, headers: dict[str, str]) -> httpx.Response:
    async with httpx.AsyncClient(base_url=front.url, timeout=30) as http:
        return await http.get(path, headers=headers)


@pytest.mark.parametrize("gateway", ["envoy-gateway", "istio"])
async def test_envoy_verifies_a_token_and_names_its_user(
    front: Gateway, open_sale: OpenSale, item: str, issuer: Issuer, header: str
) -> None:
    await open_sale(item, 10)
    ann = {"Authorization": f"Bearer {issuer.token('ann')}"}
    bought = await order(front, item, ann)
    assert (bought.status_code, bought.json()["userId"]) == (202, "ann")
    place = bought.headers["location"]
    assert (await read(front, place, ann)).json() == bought.json()
    bob = {"Authorization": f"Bearer {issuer.token('bob')}"}
    problem(await read(front, place, bob), 404, "unknown-reservation")
    # The header of a buyer never arrives, with a token and without one.
    spoofed = {header: "ann"}
    assert (await order(front, item, bob | spoofed)).json()["userId"] == "bob"
    problem(await order(front, item, bob | spoofed, user="ann"), 403, "wrong-user")
    problem(await order(front, item, spoofed), 401, "unauthorized")
    problem(await read(front, place, spoofed), 401, "unauthorized")
    for changes in ({"exp": 1}, {"aud": "another"}, {"iss": "https://elsewhere.example"}):
        wrong = {"Authorization": f"Bearer {issuer.token('ann', **changes)}"}
        assert (await order(front, item, wrong | spoofed)).status_code in (401, 403)
    assert (await read(front, f"/sales/{item}", {})).json()["available"] == 8


@pytest.mark.parametrize("gateway", ["ingress-nginx"])
async def test_nginx_asks_the_login_and_names_its_user(
    front: Gateway, open_sale: OpenSale, item: str, header: str
) -> None:
    await open_sale(item, 10)
    ann, bob = {"Cookie": "session=ann"}, {"Cookie": "session=bob"}
    bought = await order(front, item, ann)
    assert (bought.status_code, bought.json()["userId"]) == (202, "ann")
    place = bought.headers["location"]
    assert (await read(front, place, ann)).json() == bought.json()
    problem(await read(front, place, bob), 404, "unknown-reservation")
    # The header of a buyer never arrives, whether the login names a user or not.
    spoofed = {header: "ann"}
    assert (await order(front, item, bob | spoofed)).json()["userId"] == "bob"
    problem(await order(front, item, bob | spoofed, user="ann"), 403, "wrong-user")
    anonymous = {"Cookie": "session=anonymous"}
    problem(await order(front, item, anonymous | spoofed), 401, "unauthorized")
    assert (await order(front, item, spoofed)).status_code == 401
    assert (await read(front, f"/sales/{item}", ann)).json()["available"] == 8
