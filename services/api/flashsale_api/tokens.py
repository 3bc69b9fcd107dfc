"""Bearer tokens of buyers (RFC 7519), verified with the keys of their issuer (RFC 7517)."""

import asyncio
import contextlib
import logging
import re
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from hashlib import blake2b
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from itertools import chain
from typing import Any, Final, NamedTuple

import jwt
import msgspec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from jwt.exceptions import PyJWTError

from flashsale.fields import USER_ID
from flashsale.tls import relaxed
from flashsale_api.authentication import (
    UNAUTHENTICATED,
    Authentication,
    Identified,
    bearer_token,
)
from flashsale_api.metrics import Metrics
from flashsale_api.responses import RequestHeaders

log = logging.getLogger(__name__)

ALGORITHMS: Final = ("RS256", "ES256", "EdDSA")
LEEWAY_SECONDS: Final = 10
"""Tolerated difference between the issuer's clock and the pod's."""
REFRESH_SECONDS: Final = 30.0
"""Shortest time between two requests for the issuer's keys, if the first succeeded."""
MAX_TOKEN_BYTES: Final = 8 * 1024
MAX_USERS: Final = 50_000
"""Verified tokens in memory. Each needs about 250 bytes."""
MAX_WAITING: Final = 256
"""Requests that wait for a key that the pod does not have yet."""

_RETRY_SECONDS: Final = 1.0
"""Shortest time after a failed request, and the time between two while the pod has no keys."""
_DEFAULT_AGE: Final = 300.0
_LONGEST_AGE: Final = 86_400.0
_FETCH_SECONDS: Final = 5.0
"""How long a connection to the issuer may last, and how long it may be silent."""
_MAX_JWKS_BYTES: Final = 1024 * 1024
_UNREADABLE: Final = (OSError, HTTPException, ValueError, RecursionError, msgspec.DecodeError)
_SMALLEST_RSA_BITS: Final = 2048
_MAX_AGE: Final = re.compile(r"(?:^|,)\s*max-age=(\d{1,9})\s*(?:,|\Z)", re.IGNORECASE)


class _User(NamedTuple):
    user: str
    expires: float


class Tokens(Authentication):
    """Verifies bearer tokens with the keys of their issuer.

    A verified token is remembered until it expires, because the verification costs more than the
    rest of a request.
    """

    def __init__(self, keys: "Keys", issuer: str, audience: str) -> None:
        self._keys = keys
        self._issuer = issuer
        self._audience = audience
        self._users: dict[bytes, _User] = {}
        """The users by the digests of their tokens, in the order of verification."""
        self._users_of = keys.version

    @property
    def problem(self) -> str:
        return self._keys.problem

    async def run(self) -> None:
        await self._keys.run()

    def forget(self) -> None:
        """Forgets the verified tokens. They are verified again."""
        self._users.clear()

    def identify(self, headers: RequestHeaders, then: Identified) -> None:
        token = bearer_token(headers)
        if not token:
            then("", UNAUTHENTICATED)
            return
        if len(token) > MAX_TOKEN_BYTES:
            then("", f"the token has more than {MAX_TOKEN_BYTES} bytes")
            return
        if self._users_of != self._keys.version:  # a key may have been withdrawn
            self.forget()
            self._users_of = self._keys.version
        digest = blake2b(token, digest_size=16).digest()
        known = self._users.get(digest)
        if known is not None and known.expires > time.time():
            then(known.user, "")
            return
        try:
            header = jwt.get_unverified_header(token)
        except (PyJWTError, ValueError, RecursionError):
            then("", "the token is malformed")
            return

        def verify(keys: Sequence[jwt.PyJWK]) -> None:
            wrong = "the issuer has no such key" if self._keys.current else ""
            # Keys of one id differ in their algorithm, or are old and new ones without any id.
            for key in [key for key in keys if key.algorithm_name == header.get("alg")] or keys[:1]:
                try:
                    user = self._verified(token, key)
                except (PyJWTError, ValueError, TypeError, OverflowError, RecursionError) as error:
                    wrong = f"the token is invalid: {error}"
                    continue
                self._remember(digest, user)
                then(user.user, "")
                return
            then("", wrong)

        key_id = header.get("kid")
        self._keys.find(key_id if key_id and isinstance(key_id, str) else None, verify)

    def _verified(self, token: bytes, key: jwt.PyJWK) -> _User:
        """Returns the token's user. Raises one of several errors if the token is invalid."""
        claims = jwt.decode(
            token,
            key,
            algorithms=[key.algorithm_name],
            issuer=self._issuer,
            audience=self._audience,
            leeway=LEEWAY_SECONDS,
            options={"require": ["exp", "iss", "aud", "sub"]},
        )
        if not USER_ID.match(claims["sub"]):
            raise ValueError("its sub is not a userId")
        return _User(claims["sub"], float(claims["exp"]))

    def _remember(self, digest: bytes, user: _User) -> None:
        self._users.pop(digest, None)
        if len(self._users) >= MAX_USERS:
            del self._users[next(iter(self._users))]
        self._users[digest] = user


class Keys:
    """The issuer's keys from a JWKS address (RFC 7517). They stay while the address is away."""

    def __init__(self, url: str, metrics: Metrics) -> None:
        self._url = url
        self._metrics = metrics
        self._keys: dict[str | None, list[jwt.PyJWK]] = {}
        self._jwks: list[dict[str, Any]] = []
        self._waiting: list[tuple[str | None, Callable[[Sequence[jwt.PyJWK]], None]]] = []
        self._wanted = asyncio.Event()
        self._may_refresh_at = 0.0
        self._failed = True
        """Whether the last look at the address failed, or none was made."""
        self.version = 0
        """Changes whenever the keys change."""
        self.problem = "the keys at FLASHSALE_JWKS_URL have not been read yet"
        """Why there are no keys, or nothing."""

    @property
    def current(self) -> bool:
        """Whether the last look succeeded, and no other is due. If so, an unknown key is wrong."""
        return not (self._failed or self._wanted.is_set())

    def find(self, key_id: str | None, then: Callable[[Sequence[jwt.PyJWK]], None]) -> None:
        """Calls `then` with the keys of an id, immediately or after the next look at the address.

        A token without a key id is verified with the issuer's only key, or those without an id.
        """
        keys = self._keys.get(key_id, ())
        if not keys and (self._wanted.is_set() or _now() >= self._may_refresh_at):
            self._wanted.set()
            if len(self._waiting) < MAX_WAITING:
                self._waiting.append((key_id, then))
                return
        then(keys)

    async def run(self) -> None:
        """Reads the keys at once, when they expire, and when a token names an unknown one."""
        said = ""
        while True:
            self._wanted.set()  # tokens with unknown keys wait for the answer
            try:
                age = await self._refresh()
            except _UNREADABLE as error:
                self._failed = True
                age = REFRESH_SECONDS if self._keys else _RETRY_SECONDS
                self._metrics.jwks_up.set(0)
                if str(error) != said:
                    log.warning("cannot read the keys at FLASHSALE_JWKS_URL: %s", error)
                said = str(error)
                if not self._keys:
                    self.problem = f"no keys from FLASHSALE_JWKS_URL: {error}"
            else:
                if said:
                    log.info("the keys at FLASHSALE_JWKS_URL can be read again")
                said = ""
                self._failed = False
                self._metrics.jwks_up.set(1)
                self.problem = ""
            self._wanted.clear()
            self._may_refresh_at = _now() + (_RETRY_SECONDS if self._failed else REFRESH_SECONDS)
            waiting, self._waiting = self._waiting, []
            for key_id, then in waiting:
                then(self._keys.get(key_id, ()))
            try:
                async with asyncio.timeout(age):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    async def _refresh(self) -> float:
        """Reads the keys, and returns the seconds until they expire."""
        jwks, age = await asyncio.to_thread(_read, self._url)
        if jwks != self._jwks or not self._keys:
            self._keys = _usable(jwks)
            self._jwks = jwks
            self.version += 1
            log.info(
                "%d keys from FLASHSALE_JWKS_URL", len({*chain.from_iterable(self._keys.values())})
            )
        return age


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, which could lead from https to http."""

    def redirect_request(self, *_: Any, **__: Any) -> None:  # noqa: ANN401 - urllib's signature
        return None


class _Connection(HTTPConnection):
    """Ends after `_FETCH_SECONDS`. A timeout of urllib ends only a silent connection."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - HTTPConnection's
        super().__init__(*args, **kwargs)
        # Not connect(), which also waits for the answer of a proxy to CONNECT.
        self._create_connection = _connect


class _SecureConnection(HTTPSConnection, _Connection):
    """The same with TLS."""


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_Connection, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        context = relaxed(ssl.create_default_context())
        return self.do_open(_SecureConnection, request, context=context)


def _connect(*args: Any) -> socket.socket:  # noqa: ANN401 - create_connection's
    connection = socket.create_connection(*args)
    # A copy, because TLS takes the socket itself.
    ending = threading.Timer(_FETCH_SECONDS, _end, (connection.dup(),))
    ending.daemon = True
    ending.start()
    return connection


def _end(connection: socket.socket) -> None:
    with connection, contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


_open: Final = urllib.request.build_opener(_NoRedirects, _Http, _Https).open


class _Jwks(msgspec.Struct):
    keys: list[dict[str, Any]]


def _read(url: str) -> tuple[list[dict[str, Any]], float]:
    """Returns the keys of a JWKS, and their age limit in seconds. Raises one of `_UNREADABLE`."""
    request = urllib.request.Request(url, headers={"Accept": "application/json"})  # noqa: S310
    with _open(request, timeout=_FETCH_SECONDS) as answer:
        text = answer.read(_MAX_JWKS_BYTES + 1)
        rule = _MAX_AGE.search(answer.headers.get("Cache-Control", ""))
    if len(text) > _MAX_JWKS_BYTES:
        raise ValueError(f"the answer has more than {_MAX_JWKS_BYTES} bytes")
    age = float(rule[1]) if rule else _DEFAULT_AGE
    keys = sorted(msgspec.json.decode(text, type=_Jwks).keys, key=repr)  # some issuers shuffle them
    return keys, min(max(age, REFRESH_SECONDS), _LONGEST_AGE)


def _usable(jwks: list[dict[str, Any]]) -> dict[str | None, list[jwt.PyJWK]]:
    """Returns the keys for signatures by id, and an only key or those without an id under None."""
    found: dict[str | None, list[jwt.PyJWK]] = {}
    for data in jwks:
        if data.get("use", "sig") != "sig":
            continue
        try:
            key_id = msgspec.convert(data.get("kid"), str | None) or None
            key = jwt.PyJWK(data)
        except Exception as error:  # noqa: BLE001 - PyJWT checks no types, and the pod must go on
            log.warning("the JWKS has a key that cannot be read: %s", error)
            continue
        if isinstance(key.key, RSAPublicKey) and key.key.key_size < _SMALLEST_RSA_BITS:
            log.warning("the JWKS has an RSA key of less than %d bits", _SMALLEST_RSA_BITS)
        elif key.algorithm_name not in ALGORITHMS or "d" in data:
            log.warning("the JWKS has a key that is no public key for %s", ", ".join(ALGORITHMS))
        else:
            found.setdefault(key_id, []).append(key)
    if not found:
        raise ValueError(f"the JWKS has no key for {', '.join(ALGORITHMS)}")
    every = list(chain.from_iterable(found.values()))
    if len(every) == 1:
        found[None] = every
    return found


def _now() -> float:
    return asyncio.get_running_loop().time()
