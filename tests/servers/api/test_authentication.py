"""A gateway's header or a token names the user. Real API processes, a real issuer and Redis."""

import asyncio
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from dev.issuer import Issuer
from dev.services import Addresses, ApiServer
from dev.stack import process
from dev.stack.errors import StackError
from dev.stack.ports import free_port
from dev.stack.servers import RedisServer
from flashsale_api import tokens
from tests.support.api import OpenSale, claim, problem, until_known
from tests.support.eventually import until
from tests.support.paths import ROOT

NewApi: TypeAlias = Callable[..., ApiServer]
Headers: TypeAlias = dict[str, str] | dict[bytes, bytes] | Sequence[tuple[str, str]]


@pytest.fixture
def new_api(without_kafka: Addresses, tmp_path: Path) -> Iterator[NewApi]:
    """Return a function that starts an API with further settings."""
    started: list[ApiServer] = []

    def make(**settings: str) -> ApiServer:
        folder = tmp_path / f"api-{len(started)}"
        server = ApiServer(folder, without_kafka, settings=settings)
        started.append(server)
        server.start()
        return server

    yield make
    for server in started:
        server.kill()


@pytest.fixture(scope="module")
def issuer() -> Iterator[Issuer]:
    with Issuer() as found:
        yield found


@pytest.fixture
def issuer_process() -> Iterator[dict[str, str]]:
    """The variables that a process of `python -m dev.issuer` prints."""
    command = (sys.executable, "-m", "dev.issuer", "--port", "0")
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        lines = [running.stdout.readline() for _ in range(4)]
        yield dict(line.removeprefix("export ").strip().split("=", 1) for line in lines)
        running.terminate()


@pytest.mark.parametrize("port", ["99999", "taken"])
def test_an_issuer_whose_port_cannot_be_served_says_so(issuer: Issuer, port: str) -> None:
    number = str(issuer.port) if port == "taken" else port
    command = (sys.executable, "-m", "dev.issuer", "--port", number)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: port {number} cannot be served: " in done.stderr


def client(api: ApiServer) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=api.url, timeout=30)


def bearer(token: str) -> dict[bytes, bytes]:
    return {b"Authorization": b"Bearer " + token.encode("latin-1")}


async def order(
    http: httpx.AsyncClient, item: str, headers: Headers = (), **body: str
) -> httpx.Response:
    """Reserve a unit without a user in the body, unless `body` has one."""
    given = {"itemId": item, "quantity": 1, **body}
    return await http.post("/reserve", json=given, headers=headers)


async def test_a_gateways_header_names_the_user(
    new_api: NewApi, open_sale: OpenSale, item: str
) -> None:
    await open_sale(item, 10)
    async with client(new_api(FLASHSALE_USER_HEADER="X-User-Id")) as http:
        ann = {"x-user-id": "ann"}
        bought = await order(http, item, ann)
        assert (bought.status_code, bought.json()["userId"]) == (202, "ann")
        assert (await order(http, item, {"x-user-id": "bob"}, userId="bob")).status_code == 202
        problem(await order(http, item, ann, userId="bob"), 403, "wrong-user")
        place = bought.headers["location"]
        assert (await http.get(place, headers=ann)).json() == bought.json()
        problem(await http.get(place, headers={"x-user-id": "bob"}), 404, "unknown-reservation")
        for headers in (
            {},
            {"x-user-id": ""},
            {"x-user-id": "a b"},
            {"x-user-id": "a" * 129},
            [("x-user-id", "ann"), ("x-user-id", "ann")],
            {"x-user": "ann"},
        ):
            sent = {"itemId": item, "quantity": 1}
            answer = await http.post("/reserve", json=sent, headers=headers)
            assert "X-User-Id" in problem(answer, 401, "unauthorized")["detail"]
            assert answer.headers["www-authenticate"] == "Bearer"
            problem(await http.get(place, headers=headers), 401, "unauthorized")


@pytest.mark.parametrize(
    "members",
    [
        '"itemId":"another","itemId":"%s","quantity":1',
        '"itemId":"another","\\u0069temId":"%s","quantity":1',
        '"itemId":"%s","quantity":2,"quantity":1',
        '"itemId":"%s","quantity":1,"userId":"bob","userId":"ann"',
        '"itemId":"%s","quantity":1,"":1,"":1',
    ],
)
async def test_a_repeated_member_of_a_body_without_a_user_is_refused(
    new_api: NewApi, open_sale: OpenSale, item: str, members: str
) -> None:
    await open_sale(item, 10)
    headers = {"X-User-Id": "ann", "Content-Type": "application/json"}
    async with client(new_api(FLASHSALE_USER_HEADER="X-User-Id")) as http:
        body = "{%s}" % (members % item)
        answer = await http.post("/reserve", content=body, headers=headers)
        assert problem(answer, 400, "malformed-json")["detail"].endswith(" is repeated")
        sale = (await http.get(f"/sales/{item}")).json()
    assert sale["available"] == 10


@pytest.mark.parametrize("algorithm", tokens.ALGORITHMS)
async def test_a_token_names_the_user(
    new_api: NewApi, open_sale: OpenSale, item: str, issuer: Issuer, algorithm: str
) -> None:
    await open_sale(item, 10)
    async with client(new_api(**issuer.settings)) as http:
        token = issuer.token("auth0|ann", algorithm)
        bought = await order(http, item, bearer(token))
        assert (bought.status_code, bought.json()["userId"]) == (202, "auth0|ann")
        again = await order(http, item, bearer(token), userId="auth0|ann")
        problem(again, 409, "limit-reached")
        problem(await order(http, item, bearer(token), userId="bob"), 403, "wrong-user")
        place = bought.headers["location"]
        assert (await http.get(place, headers=bearer(token))).json() == bought.json()
        spoofed = {**bearer(token), b"X-User-Id": b"bob"}
        problem(await order(http, item, spoofed, userId="bob"), 403, "wrong-user")
        bob = bearer(issuer.token("bob", algorithm))
        problem(await http.get(place, headers=bob), 404, "unknown-reservation")
        problem(await http.get(place), 401, "unauthorized")


async def test_a_wrong_token_is_refused_with_the_reason(
    new_api: NewApi, open_sale: OpenSale, item: str, issuer: Issuer
) -> None:
    await open_sale(item, 10)
    now = int(time.time())
    good = issuer.token("ann")
    head, claims, signature = good.split(".")
    public = issuer.keys["RS256"].public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    plain = {"sub": "ann", "iss": issuer.url, "aud": "flashsale", "exp": now + 60}
    other_key = generate_private_key(SECP256R1())
    admin = base64.urlsafe_b64encode(json.dumps(plain | {"sub": "admin"}).encode()).decode()
    deep = base64.urlsafe_b64encode(b'{"a":' * 1000).decode().rstrip("=")
    wrong = {
        "expired": issuer.token("ann", exp=now - 60),
        "from the future": issuer.token("ann", nbf=now + 60),
        "of another issuer": issuer.token("ann", iss="https://elsewhere.example"),
        "for another audience": issuer.token("ann", aud="another"),
        "without an audience": issuer.token("ann", aud=None),
        "without an end": issuer.token("ann", exp=None),
        "without a user": issuer.token("ann", sub=None),
        "with an odd user": issuer.token("a/b c"),
        "with a number as its user": issuer.token("ann", sub=7),
        "with an endless end": issuer.token("ann", exp=10**400),
        "of another key": jwt.encode(plain, other_key, "ES256", headers={"kid": "ES256"}),
        "of an unknown key": jwt.encode(plain, other_key, "ES256", headers={"kid": "other"}),
        "without a key id": jwt.encode(plain, other_key, "ES256"),
        "without a signature": jwt.encode(plain, "", "none", headers={"kid": "ES256"}),
        "signed with the public key": _hs256(plain, pem, "RS256"),
        "with changed claims": f"{head}.{admin.rstrip('=')}.{signature}",
        "of another algorithm": _with_header(good, alg="EdDSA"),
        "with a list as its key id": _with_header(good, kid=["ES256"]),
        "with a deep header": f"{deep}.{claims}.{signature}",
        "of two parts": f"{head}.{claims}",
        "of no parts": "secret",
        "in Latin-1": "\xe4.\xf6.\xfc",
        "too long": "a" * 9_000,
    }
    async with client(new_api(**issuer.settings)) as http:
        for name, token in wrong.items():
            answer = await order(http, item, bearer(token), userId="ann")
            assert problem(answer, 401, "unauthorized")["detail"], name
            assert answer.headers["www-authenticate"] == "Bearer"
            assert token not in answer.text
        for headers in (
            {},
            {"Authorization": "Bearer"},
            {"Authorization": f"Basic {good}"},
            [("Authorization", f"Bearer {good}")] * 2,
            {"X-User-Id": "ann"},
        ):
            sent = {"userId": "ann", "itemId": item, "quantity": 1}
            answer = await http.post("/reserve", json=sent, headers=headers)
            problem(answer, 401, "unauthorized")
        assert (await order(http, item, bearer(good))).status_code == 202


def _with_header(token: str, **changes: object) -> str:
    _, claims, signature = token.split(".")
    header = jwt.get_unverified_header(token) | changes
    return f"{_part(header)}.{claims}.{signature}"


def _hs256(claims: dict[str, Any], secret: bytes, key_id: str) -> str:
    """Sign with a public key as the secret. PyJWT refuses to, so an attacker's tool is rebuilt."""
    import hashlib  # noqa: PLC0415
    import hmac  # noqa: PLC0415

    text = f"{_part({'alg': 'HS256', 'typ': 'JWT', 'kid': key_id})}.{_part(claims)}"
    digest = hmac.new(secret, text.encode(), hashlib.sha256).digest()
    return f"{text}.{base64.urlsafe_b64encode(digest).decode().rstrip('=')}"


def _part(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")


async def test_a_sale_that_is_known_to_be_sold_out_is_answered_before_the_verification(
    new_api: NewApi, open_sale: OpenSale, item: str, issuer: Issuer
) -> None:
    await open_sale(item, 1)
    async with client(new_api(**issuer.settings)) as http:
        assert (await order(http, item, bearer(issuer.token("ann")))).status_code == 202

        async def sold_out_without_a_token() -> bool:
            await order(http, item, bearer(issuer.token("bob")))
            return (await order(http, item)).status_code == 409

        await until(sold_out_without_a_token)


async def test_a_pod_without_keys_is_not_ready(
    without_kafka: Addresses, tmp_path: Path, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "START_SECONDS", 5.0)
    nowhere = f"http://127.0.0.1:{free_port()}/jwks.json"
    settings = issuer.settings | {"FLASHSALE_JWKS_URL": nowhere}
    server = ApiServer(tmp_path / "api", without_kafka, settings=settings)
    with pytest.raises(StackError, match="FLASHSALE_JWKS_URL"), server:
        pass


async def test_the_k6_scripts_send_tokens_of_an_issuer(
    redis_server: RedisServer,
    new_api: NewApi,
    open_sale: OpenSale,
    item: str,
    issuer_process: dict[str, str],
) -> None:
    token_url = issuer_process.pop("TOKEN_URL")
    await claim(redis_server.url)
    api = new_api(**issuer_process)
    until_known(api)
    await open_sale(f"{item}-soak", 100)
    await open_sale(item, 3, max_per_user=2)
    await open_sale(f"{item}-later", starts_ms=2**43)
    await open_sale(f"{item}-ended", ends_ms=1)
    await open_sale(f"{item}-paused", paused=True)
    few = {"STOCK": "100", "RATE": "10", "DURATION": "2s", "VUS": "2"}
    for script, sale in (("soak.js", f"{item}-soak"), ("smoke.js", item)):
        k6 = await asyncio.create_subprocess_exec(
            Path(sys.executable).with_name("k6"),
            *("run", "--no-usage-report", "--quiet", ROOT / "loadtest" / script),
            env={**os.environ, **few, "API_URL": api.url, "ITEM_ID": sale, "TOKEN_URL": token_url},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await k6.communicate()
        assert k6.returncode == 0, output.decode()
