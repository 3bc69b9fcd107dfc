"""The engine's Redis users, with the rights that the manifests give them."""

import re
from typing import Final

import redis

from dev.stack.servers import RedisServer
from tests.support.paths import ROOT

API: Final = "flashsale-api"
OPERATOR: Final = "flashsale"
PASSWORD: Final = "a-password-of-these-tests"


def rules(user: str) -> list[str]:
    """Return the ACL rules of a user of k8s/redis/one-node.yaml, without its password."""
    text = (ROOT / "k8s/redis/one-node.yaml").read_text()
    [found] = re.findall(rf"user {user} on >\$\w+ (.*)", text)
    # A rule in parentheses is one argument.
    return re.findall(r"\([^)]*\)|\S+", found)


def url_of(server: RedisServer, user: str) -> str:
    """Create the user, unless it exists, and return its address of the server."""
    with redis.Redis.from_url(server.url) as admin:
        admin.execute_command("ACL", "SETUSER", user, "reset", "on", f">{PASSWORD}", *rules(user))
    return server.url.replace("redis://", f"redis://{user}:{PASSWORD}@")
