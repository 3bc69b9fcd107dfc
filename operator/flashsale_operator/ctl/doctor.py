"""`flashsalectl doctor`: check Redis, Kafka, PostgreSQL and the cluster from where it runs.

Each requirement of docs/install.md is tried. Nothing is left behind in a server.
"""

import asyncio
import os
import re
import shutil
import ssl
import statistics
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from datetime import datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from pathlib import Path
from typing import Final, NamedTuple, cast

import msgspec
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import IncompatibleBrokerVersion, KafkaError

from flashsale import (
    events,
    kafka_clients,
    ledger,
    redis_client,
    redis_facts,
    requirements,
    schema,
)
from flashsale.errors import FlashsaleError, OtherEngine
from flashsale.inventory import Inventory
from flashsale.nodes import Nodes
from flashsale.redis_errors import translated
from flashsale.requirements import Finding, Requirement, TopicFacts
from flashsale.settings import KafkaSettings
from flashsale.tls import relaxed
from flashsale_operator.ctl.cli import LACKS_MIGRATIONS, Environ, Servers
from flashsale_operator.sales.manifest import API_VERSION

REDIS: Final = "Redis"
KAFKA: Final = "Kafka"
POSTGRESQL: Final = "PostgreSQL"
KUBERNETES: Final = "Kubernetes"
TIMEOUT_SECONDS: Final = 15.0
KUBECTL_SECONDS: Final = 12.0
"""Longer than its request, and shorter than the examination."""
CLOCK_SECONDS: Final = 2.0
"""A sale opens and closes by Redis' clock. People notice a larger difference."""
SLOW_MS: Final = 10.0
"""A buyer waits for one round trip to Redis."""
ROUND_TRIPS: Final = 7
ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_RESOURCE: Final = f"/apis/{API_VERSION}"
_NO_RESOURCES: Final = b"{}"

_REMEDIES: Final = {
    REDIS: "address (rediss:// for TLS), the network, the certificates and the user",
    KAFKA: "address, the listener (TLS, users), the network, the certificates and the user",
    POSTGRESQL: "address, the network, the certificates and the user",
    KUBERNETES: "address, the network and the user",
}

# The commands that the engine's scripts use to write. The first one needs memory: after another
# write, a full Redis would permit all others.
_TRY_TO_WRITE: Final = """
redis.call('HSET', KEYS[1], 'a', '1')
redis.call('HINCRBY', KEYS[1], 'a', 1)
redis.call('XADD', KEYS[2], '*', 'a', '1')
redis.call('ZADD', KEYS[3], 1, 'a')
redis.call('DEL', KEYS[1], KEYS[2], KEYS[3])
return 'written'
"""
_TRY_TO_RECORD: Final = """
INSERT INTO kafka_offsets (topic, partition, next_offset) VALUES ($1, 0, 0)
"""


class _Resource(msgspec.Struct):
    kind: str


class _Resources(msgspec.Struct):
    """The kube-apiserver's list of the resources of an API group."""

    resources: tuple[_Resource, ...] = ()


class _Home(NamedTuple):
    """The engine's id in the ledger, and the address of the Redis with its sales."""

    engine_id: str
    redis_address: str | None


async def examine(addresses: Servers, environ: Environ) -> list[Finding]:
    """Checks all servers at the same time. Returns the findings by server."""
    home = await _home(addresses.database_url)
    found = await asyncio.gather(
        _within(REDIS, _redis(addresses.redis_url, addresses.engine, home)),
        _within(KAFKA, _kafka(addresses, home)),
        _within(POSTGRESQL, _postgresql(addresses.database_url, addresses.engine)),
        _within(KUBERNETES, _kubernetes(environ)),
    )
    return [finding for group in found for finding in group]


async def _home(database_url: str) -> _Home | None:
    """Returns the ledger's engine, or None if the ledger has none or cannot be read."""
    try:
        pool = await ledger.connect(database_url, max_connections=1)
        try:
            async with ledger.translated():
                row = await pool.fetchrow("SELECT id::text, redis_address FROM engine")
        finally:
            pool.terminate()
    except FlashsaleError:  # the checks of PostgreSQL say why
        return None
    return None if row is None else _Home(row["id"], row["redis_address"])


async def _within(server: str, checks: AsyncIterator[Finding]) -> list[Finding]:
    """Returns the findings. An error of the server ends its checks with a failure."""
    found: list[Finding] = []
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            async for finding in checks:
                found.append(finding)  # noqa: PERF401 - kept if a later check raises
    except (FlashsaleError, KafkaError, OSError, TimeoutError) as error:
        # An old server refuses some calls. Its version is the failure then.
        if not any(each.verdict == "failure" for each in found):
            why = " ".join(str(error).split()) or f"no answer within {TIMEOUT_SECONDS:.0f} s"
            text = f"{why}: check the {_REMEDIES[server]}"
            found.append(Finding(server, text, "failure"))
    return found


async def _redis(url: str, engine: str, home: _Home | None) -> AsyncIterator[Finding]:
    redis = redis_client.connect(url)
    try:
        inventory = Inventory(redis, engine)
        facts = await redis_facts.read(redis, engine)
        for each in facts:
            name = each.node or f"the address {inventory.address}"
            yield Finding(REDIS, f"{name} answers, version {each.version or 'unknown'}", "ok")
        answered = {each.node for each in facts}
        for node in await inventory.nodes.all():
            if node.name not in answered:
                why = inventory.nodes.failures.get(node.name, "no reply in time")
                text = (
                    f"{node.name} does not answer, and its sales stop: {why}: start it, promote a "
                    "replica of it, or check the network, its certificate and the user"
                )
                yield Finding(REDIS, text, "failure")
        unread = set[str]().union(*(each.unread for each in facts))
        clustered = any(each.cluster for each in facts)
        for finding in requirements.findings(requirements.REDIS, *facts):
            if finding.server != REDIS and not clustered:
                continue  # a rule of a cluster
            if finding.verdict == "ok" and finding.text.partition(" ")[0] in unread:
                text = f"needs {finding.text}, which cannot be read: ask the provider"
                yield Finding(finding.server, text, "warning")
            else:
                yield finding
        yield await _check_script(inventory.nodes, engine)
        if home is not None:
            yield await _check_claim(inventory, home)
        yield _round_trip(REDIS, await _measured(lambda: translated(redis.ping())))
        asked = time.time()
        for clock in (await inventory.clocks()).values():
            yield _clock(REDIS, clock.now_ms / 1000, asked)
    finally:
        await redis.aclose()


async def _check_claim(inventory: Inventory, home: _Home) -> Finding:
    try:
        await inventory.index.claimed(home.engine_id)
    except OtherEngine as error:
        return Finding(REDIS, str(error), "failure")
    if home.redis_address not in (None, inventory.address):
        text = (
            f"the sales are in the Redis at {home.redis_address}, and not at {inventory.address}: "
            "move them, or name the former address"
        )
        return Finding(REDIS, text, "failure")
    claimed = await inventory.index.engine_id()
    whose = "belongs to the ledger's engine" if claimed else "belongs to no engine yet"
    return Finding(REDIS, whose, "ok")


async def _check_script(nodes: Nodes, engine: str) -> Finding:
    tag = f"{engine}:{{doctor-{uuid.uuid4().hex}}}"
    keys = (f"{tag}:sale", f"{tag}:outbox", f"{tag}:pods")
    try:
        await nodes.call(
            keys[0],
            lambda redis: cast("Awaitable[str]", redis.eval(_TRY_TO_WRITE, len(keys), *keys)),
        )
    except FlashsaleError as error:
        text = f"a script cannot write: {error}"
        if re.search("permission|user executing the script", text):
            text += ": allow this user the commands of k8s/redis"
        return Finding(REDIS, text, "failure")
    return Finding(REDIS, "a script can write keys of this engine", "ok")


async def _postgresql(url: str, engine: str) -> AsyncIterator[Finding]:
    pool = await ledger.connect(url, max_connections=1)
    try:
        facts = await schema.facts(pool)
        version = f"version {facts.version // 10_000}.{facts.version % 10_000}"
        yield Finding(POSTGRESQL, f"the address answers, {version}", "ok")
        for finding in requirements.findings(requirements.LEDGER, facts):
            yield finding
        if facts.outdated:
            yield Finding(POSTGRESQL, LACKS_MIGRATIONS, "warning")
        else:
            yield await _check_transaction(pool)
            yield await _check_owner(pool, engine)
        async with ledger.translated():
            seconds = await _measured(lambda: pool.fetchval("SELECT 1"))
            asked = time.time()
            now: datetime = await pool.fetchval("SELECT clock_timestamp()")
        yield _round_trip(POSTGRESQL, seconds)
        yield _clock(POSTGRESQL, now.timestamp(), asked)
    finally:
        pool.terminate()


async def _check_transaction(pool: ledger.Pool) -> Finding:
    """Writes into the ledger, and rolls back."""
    try:
        async with ledger.translated(), pool.acquire() as connection:
            transaction = connection.transaction()
            await transaction.start()
            try:
                await connection.execute(_TRY_TO_RECORD, f"doctor-{uuid.uuid4().hex}")
            finally:
                await transaction.rollback()
    except FlashsaleError as error:
        text = f"a transaction cannot write: {error}: name the primary server and grant the rights"
        return Finding(POSTGRESQL, text, "failure")
    return Finding(POSTGRESQL, "a transaction can write", "ok")


async def _check_owner(pool: ledger.Pool, engine: str) -> Finding:
    async with ledger.translated():
        name = await pool.fetchval("SELECT name FROM engine")
    if name in (None, engine):
        return Finding(POSTGRESQL, f"the ledger belongs to the engine {engine}", "ok")
    text = f"the ledger belongs to the engine {name}: set FLASHSALE_ENGINE={name}"
    return Finding(POSTGRESQL, text, "failure")


async def _kafka(settings: KafkaSettings, home: _Home | None = None) -> AsyncIterator[Finding]:
    admin = AIOKafkaAdminClient(
        **settings.kafka_client(), request_timeout_ms=int(TIMEOUT_SECONDS * 1000)
    )
    try:
        await admin.start()
        brokers = len((await admin.describe_cluster())["brokers"])
        yield Finding(KAFKA, f"the address answers, brokers: {brokers}", "ok")
        for topic, table in (
            (events.topic(settings.engine), requirements.topic()),
            (events.recorded_topic(settings.engine), requirements.RECORDED),
        ):
            for finding in await _check_topic(admin, topic, table):
                yield finding
        if home is not None and (found := await _check_group(admin, settings.engine, home)):
            yield found
        seconds = await _measured(admin.describe_cluster)
        yield _round_trip(KAFKA, seconds, buyers=False)
    except IncompatibleBrokerVersion as error:
        yield Finding(KAFKA, f"{error}: upgrade the brokers to Kafka 2.4 or newer", "failure")
    finally:
        await kafka_clients.close("Kafka's client", admin.close())


async def _check_group(admin: AIOKafkaAdminClient, engine: str, home: _Home) -> Finding | None:
    """Compares the owner of the consumer group, if Kafka tells it."""
    try:
        owner = await kafka_clients.group_owner(admin, engine)
    except KafkaError:  # of a new Kafka without any group, too
        return None
    if owner is None:
        return None
    if owner == home.engine_id:
        return Finding(KAFKA, "the consumer group belongs to the ledger's engine", "ok")
    text = (
        f"the consumer group {events.consumer_group(engine)} belongs to engine {owner}, and the "
        f"ledger to engine {home.engine_id}: restore the ledger of engine {owner}, or see "
        '"Several engines" in docs/operations.md'
    )
    return Finding(KAFKA, text, "failure")


async def _check_topic(
    admin: AIOKafkaAdminClient, topic: str, table: Iterable[Requirement[TopicFacts]]
) -> list[Finding]:
    facts = await kafka_clients.topic_facts(admin, topic)
    if facts is None:
        text = f"the topic {topic} does not exist, or this user may not describe it"
        remedy = "start a consumer, which creates it, or create it"
        return [Finding(KAFKA, f"{text}: {remedy}", "warning")]
    found = requirements.findings(table, facts)
    if not facts.config:
        text = f"this user may not describe the settings of the topic {topic}"
        found.append(Finding(KAFKA, f"{text}: allow it DescribeConfigs", "warning"))
    return found


async def _kubernetes(environ: Environ) -> AsyncIterator[Finding]:
    """Asks for the FlashSale resource, by the pod's account or by kubectl. No cluster is ok."""
    if (ACCOUNT / "token").exists() and environ.get("KUBERNETES_SERVICE_HOST"):
        look = _by_account
    elif shutil.which("kubectl") and _has_kubeconfig(environ):
        look = _by_kubectl
    else:
        yield Finding(KUBERNETES, "there is no cluster here, which is no mistake", "ok")
        return
    asked, began = time.time(), time.monotonic()
    answer, date = await asyncio.to_thread(look, environ)
    seconds = time.monotonic() - began
    try:
        kinds = {each.kind for each in msgspec.json.decode(answer, type=_Resources).resources}
    except ValueError:  # also msgspec's
        raise OSError("the answer is not the kube-apiserver's") from None
    if "FlashSale" not in kinds:
        text = "the cluster has no FlashSale resource: install the chart's CRD (crds.enabled)"
        yield Finding(KUBERNETES, text, "failure")
        return
    yield Finding(KUBERNETES, f"FlashSales are served, {seconds * 1000:.0f} ms", "ok")
    if date:
        yield _clock(KUBERNETES, parsedate_to_datetime(date).timestamp() + 0.5, asked)


def _has_kubeconfig(environ: Environ) -> bool:
    return bool(environ.get("KUBECONFIG")) or Path("~/.kube/config").expanduser().exists()


def _by_account(environ: Environ) -> tuple[bytes, str]:
    host, port = environ["KUBERNETES_SERVICE_HOST"], environ.get("KUBERNETES_SERVICE_PORT", "443")
    host = f"[{host}]" if ":" in host else host
    request = urllib.request.Request(
        f"https://{host}:{port}{_RESOURCE}",
        headers={"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}"},
    )
    context = relaxed(ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt")))
    straight = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    try:
        with straight.open(request, timeout=10) as answer:
            return answer.read(), answer.headers.get("Date", "")
    except urllib.error.HTTPError as error:
        with error:
            if error.code == HTTPStatus.NOT_FOUND:
                return _NO_RESOURCES, ""
            raise OSError(f"the kube-apiserver answered {error.code}") from None


def _by_kubectl(environ: Environ) -> tuple[bytes, str]:
    command = ["kubectl", "get", "--raw", _RESOURCE, "--request-timeout=10s"]
    try:
        done = subprocess.run(  # noqa: S603 - no argument is from outside
            command,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,  # or it can ask for a password
            capture_output=True,
            check=False,
            timeout=KUBECTL_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"kubectl gave no answer within {KUBECTL_SECONDS:.0f} s") from None
    if done.returncode == 0:
        return done.stdout, ""
    error = done.stderr.decode(errors="replace")
    if "could not find the requested resource" in error or "NotFound" in error:
        return _NO_RESOURCES, ""
    raise OSError(" ".join(error.split())[:300])


async def _measured(call: Callable[[], Awaitable[object]]) -> float:
    """Returns the median time of some round trips, in seconds."""
    seconds = []
    for _ in range(ROUND_TRIPS):
        began = time.monotonic()
        await call()
        seconds.append(time.monotonic() - began)
    return statistics.median(seconds)


def _round_trip(server: str, seconds: float, *, buyers: bool = True) -> Finding:
    milliseconds = seconds * 1000
    text = f"a round trip takes {milliseconds:.1f} ms"
    if milliseconds <= SLOW_MS or not buyers:
        return Finding(server, text, "ok")
    return Finding(server, f"{text}: place the engine close to the server", "warning")


def _clock(server: str, timestamp: float, asked: float) -> Finding:
    """Compares a server's time with this machine's. The server read it at some time since `asked`.

    A reply can take seconds, which are no difference of the clocks.
    """
    difference = timestamp - min(max(timestamp, asked), time.time())
    text = f"its clock differs by {abs(difference):.1f} s"
    if abs(difference) <= CLOCK_SECONDS:
        return Finding(server, text, "ok")
    ahead = "ahead of" if difference > 0 else "behind"
    text = f"its clock is {abs(difference):.0f} s {ahead} this machine's"
    return Finding(server, f"{text}: synchronize both clocks by NTP", "warning")
