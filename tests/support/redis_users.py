"""The engine's Redis users, with the rights that the manifests give them."""

import re
from dataclasses import replace
from typing import Final

from dev.services import Addresses
from dev.stack.servers import RedisServer
from tests.support.paths import ROOT

API: Final = "flashsale-api"
OPERATOR: Final = "flashsale"
TESTER: Final = "flashsale-tester"
"""The operator's user, with the commands by which tests damage or inspect a server."""
PASSWORD: Final = "a-password-of-these-tests"

_OF_TESTS: Final = (
    *("+flushall", "+keys", "+config|set", "+copy", "+sismember"),
    *("+multi", "+exec"),
)


def rules(user: str, manifest: str) -> list[str]:
    """Return the ACL rules of a user of a manifest in k8s/redis, without its password."""
    text = (ROOT / f"k8s/redis/{manifest}.yaml").read_text()
    [found] = re.findall(rf"user {user} on >\$\w+ (.*)", text)
    # A rule in parentheses is one argument.
    return re.findall(r"\([^)]*\)|\S+", found)


def options(*, clustered: bool = False) -> list[str]:
    """Return the arguments of a server that has the users, also after it was restarted."""
    users = {user: rules(user, "cluster" if clustered else "one-node") for user in (API, OPERATOR)}
    users[TESTER] = [*users[OPERATOR], *_OF_TESTS]
    return [
        word
        for user, given in users.items()
        for word in ("--user", user, "on", f">{PASSWORD}", *given)
    ]


def url_of(server: RedisServer, user: str, port: int | None = None) -> str:
    """Return the address of a server with `options` for a user, or of a proxy at `port`."""
    return f"redis://{user}:{PASSWORD}@127.0.0.1:{port or server.port}/0"


def of_api(addresses: Addresses) -> Addresses:
    """Return the operator's addresses with the user of the API."""
    return _of(addresses, API)


def of_tester(addresses: Addresses) -> Addresses:
    """Return the operator's addresses with the user of tests."""
    return _of(addresses, TESTER)


def _of(addresses: Addresses, user: str) -> Addresses:
    url = addresses.redis_url.replace(f"//{OPERATOR}:", f"//{user}:")
    return replace(addresses, redis_url=url)
