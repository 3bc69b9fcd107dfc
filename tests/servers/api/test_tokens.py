"""The keys of an issuer, and the tokens that they verify. A real issuer, without an API."""

import asyncio
import contextlib
import json
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, Final

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from dev.issuer import AUDIENCE, Issuer
from flashsale_api import tokens
from flashsale_api.metrics import Metrics
from flashsale_api.tokens import Keys, Tokens
from tests.support.eventually import until


async def test_keys_rotate_and_survive_that_their_address_is_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "REFRESH_SECONDS", 0.2)
    with Issuer() as issuer:
        metrics = Metrics()
        keys = Keys(issuer.settings["FLASHSALE_JWKS_URL"], metrics)
        named = Tokens(keys, issuer.url, "flashsale")
        running = asyncio.create_task(named.run())
        assert await identified(named, issuer.token("ann")) == ("ann", "")
        assert issuer.requests == 1

        fresh = generate_private_key(SECP256R1())
        issuer.published["new"] = ECAlgorithm.to_jwk(fresh.public_key(), as_dict=True)
        claims = {"sub": "bob", "iss": issuer.url, "aud": "flashsale", "exp": time.time() + 60}
        new = jwt.encode(claims, fresh, "ES256", headers={"kid": "new"})
        await until(lambda: _is(named, new, "bob"))

        del issuer.published["ES256"]  # withdrawn: its remembered tokens are refused too
        unknown = jwt.encode(claims, fresh, "ES256", headers={"kid": "unknown"})
        old = issuer.token("ann")

        async def withdrawn() -> bool:
            await identified(named, unknown)
            return await _is(named, old, "")

        await until(withdrawn)

        assert b"flashsale_api_jwks_up 1.0" in metrics.text()
        issuer.stop()

        # The issuer may have the key by now, so the token is not refused.
        await until(lambda: _has(named, unknown, ("", "")))
        assert b"flashsale_api_jwks_up 0.0" in metrics.text()
        assert await identified(named, new) == ("bob", "")
        assert named.problem == ""
        running.cancel()


@pytest.mark.parametrize(
    ("head", "of_proxy"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999\r\n\r\n", False),
        (b"HTTP/1.1 200 OK\r\nX: ", True),
    ],
)
async def test_a_slow_answer_with_keys_is_given_up(
    monkeypatch: pytest.MonkeyPatch, head: bytes, of_proxy: bool
) -> None:
    """Tokens with unknown keys wait for the answer."""
    monkeypatch.setattr(tokens, "_FETCH_SECONDS", 0.5)
    monkeypatch.setattr(tokens, "REFRESH_SECONDS", 0.1)

    async def trickle(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            writer.write(head)
            while not writer.is_closing():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.05)

    with Issuer() as issuer:
        slow = await asyncio.start_server(trickle, "127.0.0.1", 0)
        metrics = Metrics()
        keys = Keys(issuer.settings["FLASHSALE_JWKS_URL"], metrics)
        named = Tokens(keys, issuer.url, "flashsale")
        running = asyncio.create_task(named.run())
        assert await identified(named, issuer.token("ann")) == ("ann", "")
        keys._url = url = f"http://127.0.0.1:{slow.sockets[0].getsockname()[1]}"
        if of_proxy:  # it answers CONNECT
            proxy = urllib.request.ProxyHandler({"https": url})
            handlers = proxy, tokens._NoRedirects, tokens._Http, tokens._Https
            monkeypatch.setattr(tokens, "_open", urllib.request.build_opener(*handlers).open)
            keys._url = "https://issuer.example"
        unknown = jwt.encode({}, generate_private_key(SECP256R1()), "ES256", headers={"kid": "x"})

        await until(lambda: _has(named, unknown, ("", "")))
        assert b"flashsale_api_jwks_up 0.0" in metrics.text()
        assert await identified(named, issuer.token("bob")) == ("bob", "")
        running.cancel()
        slow.close()


_ODD: Final[tuple[object, ...]] = (
    None,
    7,
    True,
    -1.5,
    "",
    "é",
    "A" * 100_000,
    [],
    ["a"],
    {},
    {"a": []},
    10**30,
)


@pytest.mark.parametrize("name", ["kid", "kty", "crv", "n", "e", "x", "y", "alg", "use", "key_ops"])
def test_a_malformed_key_takes_no_other_key_away(name: str) -> None:
    rsa = RSAAlgorithm.to_jwk(generate_rsa(65537, 2048).public_key(), as_dict=True)
    curve = ECAlgorithm.to_jwk(generate_private_key(SECP256R1()).public_key(), as_dict=True)
    for key in (rsa, curve):
        for odd in _ODD:
            found = tokens._usable([{**key, "kid": "odd", name: odd}, {**curve, "kid": "good"}])
            assert "good" in found
            assert {type(key_id) for key_id in found} <= {str, type(None)}


def test_a_short_rsa_key_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    rsa = RSAAlgorithm.to_jwk(generate_rsa(65537, 1024).public_key(), as_dict=True)
    curve = ECAlgorithm.to_jwk(generate_private_key(SECP256R1()).public_key(), as_dict=True)
    assert set(tokens._usable([{**rsa, "kid": "short"}, {**curve, "kid": "good"}])) >= {"good"}
    assert caplog.messages == ["the JWKS has an RSA key of less than 2048 bits"]


def test_only_public_keys_for_signatures_are_used() -> None:
    """Every reader of the address can sign with a private key."""
    private = ECAlgorithm.to_jwk(generate_private_key(SECP256R1()), as_dict=True)
    public = ECAlgorithm.to_jwk(generate_private_key(SECP256R1()).public_key(), as_dict=True)
    good = {**public, "kid": "good"}
    encrypting = {**public, "kid": "encrypting", "use": "enc"}
    assert tokens._usable([{**private, "kid": "private"}, encrypting, good]).keys() == {
        "good",
        None,
    }


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"keys": {}}',
        b'{"keys": null}',
        b'{"keys": ["a"]}',
        b'{"keys": [[]]}',
        b'{"keys": [{}]}',
        b'{"keys": [' + b"[" * 100_000,
        b'{"keys": [{"kid": ' + b'{"a":' * 100_000,
        b'{"keys": [{"kid": ' + b"9" * 100_000 + b"}]}",
        b'{"keys": [{"kid": 1e999}]}',
        b'{"keys": [{"kid": ["a"], "kty": "oct", "k": "AAAA"}]}',
    ],
)
async def test_a_malformed_document_leaves_the_known_keys(
    monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    monkeypatch.setattr(tokens, "REFRESH_SECONDS", 0.1)
    with Issuer(max_age=0) as issuer:
        metrics = Metrics()
        keys = Keys(issuer.settings["FLASHSALE_JWKS_URL"], metrics)
        named = Tokens(keys, issuer.url, "flashsale")
        running = asyncio.create_task(named.run())
        assert await identified(named, issuer.token("ann")) == ("ann", "")
        monkeypatch.setattr(issuer, "_answer", lambda: text)
        await until(lambda: running.done() or b"flashsale_api_jwks_up 0.0" in metrics.text())
        assert not running.done()
        assert await identified(named, issuer.token("bob")) == ("bob", "")
        running.cancel()


async def test_keys_are_read_again_when_they_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "REFRESH_SECONDS", 0.1)
    with Issuer(max_age=0) as issuer:
        keys = Keys(issuer.settings["FLASHSALE_JWKS_URL"], Metrics())
        running = asyncio.create_task(keys.run())
        await until(lambda: issuer.requests >= 3)
        version = keys.version
        del issuer.published["RS256"]
        await until(lambda: keys.version > version)
        running.cancel()


@pytest.mark.parametrize(
    ("max_age", "seconds"), [(None, 300), (0, 30), (600, 600), (999_999_999, 86_400)]
)
def test_the_age_of_keys_has_bounds(max_age: int | None, seconds: float) -> None:
    """Without them, a pod would ask an issuer without a pause, or never see a withdrawn key."""
    with Issuer(max_age=max_age) as issuer:
        _, age = tokens._read(issuer.settings["FLASHSALE_JWKS_URL"])
    assert age == seconds


def test_a_redirect_is_not_followed() -> None:
    """It could lead from https to http, where another server can answer with its own keys."""

    class Redirecting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(302)
            self.send_header("Location", issuer.settings["FLASHSALE_JWKS_URL"])
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:  # noqa: ANN401 - http.server's signature
            """Write nothing."""

    with Issuer() as issuer, HTTPServer(("127.0.0.1", 0), Redirecting) as server:
        answering = threading.Thread(target=server.handle_request)
        answering.start()
        with pytest.raises(tokens._UNREADABLE, match="302"):
            tokens._read(f"http://127.0.0.1:{server.server_port}/jwks.json")
        answering.join()
        assert issuer.requests == 0


async def test_an_unknown_key_is_looked_for_soon_after_a_failed_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The issuer was away at the first token of a new key. All its buyers wait for the next."""
    with Issuer() as issuer:
        metrics = Metrics()
        keys = Keys(issuer.settings["FLASHSALE_JWKS_URL"], metrics)
        named = Tokens(keys, issuer.url, AUDIENCE)
        running = asyncio.create_task(named.run())
        assert await identified(named, issuer.token("ann")) == ("ann", "")
        fresh = generate_private_key(SECP256R1())
        issuer.published["new"] = ECAlgorithm.to_jwk(fresh.public_key(), as_dict=True)
        claims = {"sub": "bob", "iss": issuer.url, "aud": AUDIENCE, "exp": time.time() + 3600}
        new = jwt.encode(claims, fresh, "ES256", headers={"kid": "new"})
        monkeypatch.setattr(tokens, "REFRESH_SECONDS", 3_600.0)
        keys._may_refresh_at = 0.0
        with monkeypatch.context() as patch:
            patch.setattr(issuer, "_answer", lambda: b"")
            assert await identified(named, new) == ("", "")
        await until(lambda: _is(named, new, "bob"))
        running.cancel()


async def test_an_outage_of_the_issuer_is_logged_once_and_its_end_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "flashsale_api")
    monkeypatch.setattr(tokens, "REFRESH_SECONDS", 0.1)
    reads = 0
    read = tokens._read

    def away(_: str) -> tuple[list[dict[str, Any]], float]:
        nonlocal reads
        reads += 1
        return read("http://127.0.0.1:1")

    with Issuer(max_age=0) as issuer:
        keys = Keys(issuer.settings["FLASHSALE_JWKS_URL"], Metrics())
        running = asyncio.create_task(keys.run())
        await until(lambda: not keys.problem)
        with monkeypatch.context() as patch:
            patch.setattr(tokens, "_read", away)
            await until(lambda: reads > 5)
        await until(lambda: "can be read again" in caplog.text)
        requests = issuer.requests
        await until(lambda: issuer.requests > requests + 3)
        running.cancel()
    assert caplog.text.count("cannot read the keys") == 1
    assert caplog.text.count("can be read again") == 1


async def test_unknown_keys_are_looked_for_at_most_once_per_interval() -> None:
    with Issuer() as issuer:
        keys = Keys(issuer.settings["FLASHSALE_JWKS_URL"], Metrics())
        named = Tokens(keys, issuer.url, "flashsale")
        running = asyncio.create_task(named.run())
        assert await identified(named, issuer.token("ann")) == ("ann", "")
        other = generate_rsa(65537, 2048)
        for number in range(100):
            token = jwt.encode({"sub": "a"}, other, "RS256", headers={"kid": str(number)})
            assert await identified(named, token) == ("", "the issuer has no such key")
        assert issuer.requests == 1
        running.cancel()


async def test_tokens_too_many_to_wait_for_the_keys_are_not_refused_for_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tokens, "MAX_WAITING", 3)
    with Issuer() as issuer:
        named = Tokens(
            Keys(issuer.settings["FLASHSALE_JWKS_URL"], Metrics()), issuer.url, "flashsale"
        )
        running = asyncio.create_task(named.run())
        assert await identified(named, issuer.token("ann")) == ("ann", "")
        named._keys._may_refresh_at = 0.0
        other = generate_rsa(65537, 2048)
        unknown = [jwt.encode({}, other, "RS256", headers={"kid": str(n)}) for n in range(5)]
        found = await asyncio.gather(*(identified(named, token) for token in unknown))
        assert found == [("", "the issuer has no such key")] * 3 + [("", "")] * 2
        running.cancel()


async def test_keys_that_share_an_id_or_have_none_are_all_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """During a rotation of keys without ids, and with one id for keys of two algorithms."""
    old, new = (generate_private_key(SECP256R1()) for _ in range(2))
    rsa = generate_rsa(65537, 2048)
    published = [
        *(ECAlgorithm.to_jwk(key.public_key(), as_dict=True) for key in (old, new)),
        ECAlgorithm.to_jwk(new.public_key(), as_dict=True) | {"kid": "shared"},
        RSAAlgorithm.to_jwk(rsa.public_key(), as_dict=True) | {"kid": "shared"},
    ]
    with Issuer() as issuer:
        monkeypatch.setattr(issuer, "_answer", lambda: json.dumps({"keys": published}).encode())
        keys = Keys(issuer.settings["FLASHSALE_JWKS_URL"], Metrics())
        named = Tokens(keys, issuer.url, AUDIENCE)
        running = asyncio.create_task(named.run())
        claims = {"sub": "ann", "iss": issuer.url, "aud": AUDIENCE, "exp": 2**33}
        for key, algorithm, headers in (
            (old, "ES256", {}),
            (new, "ES256", {}),
            (new, "ES256", {"kid": "shared"}),
            (rsa, "RS256", {"kid": "shared"}),
        ):
            token = jwt.encode(claims, key, algorithm, headers=headers)
            assert await identified(named, token) == ("ann", "")
        other = jwt.encode(claims, generate_private_key(SECP256R1()), "ES256")
        user, why = await identified(named, other)
        assert (user, why) == ("", "the token is invalid: Signature verification failed")
        version = keys.version
        published.reverse()
        await keys._refresh()
        assert keys.version == version
        running.cancel()


async def test_a_remembered_token_is_not_verified_again(monkeypatch: pytest.MonkeyPatch) -> None:
    verified: list[bytes] = []
    decode = jwt.decode

    def noted(token: bytes, *given: Any, **options: Any) -> dict[str, Any]:  # noqa: ANN401
        verified.append(token)
        return decode(token, *given, **options)

    monkeypatch.setattr(jwt, "decode", noted)
    with Issuer() as issuer:
        named = Tokens(
            Keys(issuer.settings["FLASHSALE_JWKS_URL"], Metrics()), issuer.url, "flashsale"
        )
        running = asyncio.create_task(named.run())
        assert await identified(named, issuer.token("first")) == ("first", "")
        verified.clear()  # the arrival of the keys made the pod forget the first token
        ann, bob = issuer.token("ann"), issuer.token("bob")
        for token, user in ((ann, "ann"), (bob, "bob"), (ann, "ann"), (bob, "bob")):
            assert await identified(named, token) == (user, "")
        assert verified == [ann.encode(), bob.encode()]
        running.cancel()


async def test_remembered_tokens_are_bounded_and_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "MAX_USERS", 10)
    with Issuer() as issuer:
        keys = Keys(issuer.settings["FLASHSALE_JWKS_URL"], Metrics())
        named = Tokens(keys, issuer.url, "flashsale")
        running = asyncio.create_task(named.run())
        for number in range(30):
            token = issuer.token(f"user-{number}")
            assert await identified(named, token) == (f"user-{number}", "")
        assert len(named._users) == 10
        short = issuer.token("ann", exp=int(time.time()) + 2 - tokens.LEEWAY_SECONDS)
        assert await identified(named, short) == ("ann", "")
        await until(lambda: _is(named, short, ""))
        running.cancel()


async def identified(named: Tokens, token: str) -> tuple[str, str]:
    """Return the user of a token and the reason why there is none."""
    found: asyncio.Future[tuple[str, str]] = asyncio.get_running_loop().create_future()
    named.identify(
        [(b"authorization", f"Bearer {token}".encode())],
        lambda user, reason: found.set_result((user, reason)),
    )
    return await found


async def _is(named: Tokens, token: str, user: str) -> bool:
    return (await identified(named, token))[0] == user


async def _has(named: Tokens, token: str, found: tuple[str, str]) -> bool:
    return await identified(named, token) == found
