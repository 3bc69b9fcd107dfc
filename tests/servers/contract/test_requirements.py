"""The requirements of Redis and PostgreSQL, checked on real servers that lack them."""

import logging
import re
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from redis.asyncio import Redis

from dev.stack.servers import PostgresServer, RedisServer
from flashsale import ledger, redis_client, redis_facts, requirements, schema
from flashsale.errors import LedgerUnavailable, RedisUnavailable, UnmetRequirement
from flashsale.inventory import Inventory
from flashsale.requirements import (
    Checks,
    ClusterFacts,
    Finding,
    LedgerFacts,
    RedisFacts,
    Requirement,
    TopicFacts,
    findings,
)
from tests.support.paths import ROOT
from tests.support.proxy import Proxy

GOOD_REDIS = RedisFacts("7.0.15", "noeviction", "0", appendonly=True, script_error="")
GOOD_CLUSTER = ClusterFacts(requirements.SLOTS, {}, replicas=1)
CREATE_TIME = {"message.timestamp.type": "CreateTime"}
GOOD_LEDGER = LedgerFacts(180_000, "UTF8", "public", may_create=True, outdated=False, lacking=())


def require_redis(*facts: RedisFacts) -> None:
    Checks().require(requirements.REDIS, *facts)


async def require_ledger(url: str) -> None:
    pool = await ledger.connect(url)
    try:
        Checks().require(requirements.LEDGER, await schema.facts(pool))
    finally:
        await pool.close()


async def test_a_server_of_the_stack_meets_all_requirements(
    inventory: Inventory, pool: asyncpg.Pool
) -> None:
    for found in (
        requirements.findings(requirements.REDIS, *await redis_facts.read(inventory.redis)),
        requirements.findings(requirements.LEDGER, await schema.facts(pool)),
    ):
        assert {finding.verdict for finding in found} == {"ok"}, found


@pytest.mark.usefixtures("redis_server")
@pytest.mark.parametrize(
    ("setting", "value"), [("maxmemory-policy", "allkeys-lru"), ("repl-backlog-ttl", "3600")]
)
async def test_a_setting_of_redis_that_endangers_sales_is_named(
    inventory: Inventory, redis: Redis, setting: str, value: str
) -> None:
    before = str((await redis.config_get(setting))[setting])
    await redis.config_set(setting, value)
    try:
        facts = await redis_facts.read(inventory.redis)
    finally:
        await redis.config_set(setting, before)
    with pytest.raises(UnmetRequirement) as unmet:
        require_redis(*facts)
    assert str(unmet.value).startswith(f"Redis has {setting} {value}, but needs {setting} {before}")


@asynccontextmanager
async def redis_user(server: RedisServer, *rules: str) -> AsyncIterator[Redis]:
    """Yield a client of a user with these ACL rules."""
    admin = redis_client.connect(server.url)
    name = f"user-{uuid.uuid4().hex[:8]}"
    await admin.acl_setuser(
        name, enabled=True, passwords=["+secret"], keys=["flashsale:*"], commands=list(rules)
    )
    client = redis_client.connect(f"redis://{name}:secret@127.0.0.1:{server.port}/0")
    try:
        yield client
    finally:
        await client.aclose()
        await admin.acl_deluser(name)
        await admin.aclose()


async def test_a_redis_user_without_info_is_a_mistake_and_no_outage(
    redis_server: RedisServer,
) -> None:
    async with redis_user(redis_server, "+@all", "-@dangerous") as client:
        with pytest.raises(UnmetRequirement, match="but needs INFO in scripts"):
            require_redis(*await redis_facts.read(client))
    async with redis_user(redis_server, "+@all", "-info", "-cluster") as client:
        with pytest.raises(UnmetRequirement, match=r"connections need .* 'info' command"):
            await redis_facts.read(client)
    async with redis_user(redis_server, "+@all", "-@dangerous", "+info") as client:
        require_redis(*await redis_facts.read(client))


async def test_a_redis_user_without_select_is_a_mistake_and_no_outage(
    redis_server: RedisServer,
) -> None:
    async with redis_user(redis_server, "+@all", "-select") as client:
        client.connection_pool.connection_kwargs["db"] = 1
        with pytest.raises(UnmetRequirement, match=r"connections need .* 'select' command"):
            await redis_facts.read(client)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("INFO", "has no INFO in scripts (this user may not call it), but needs INFO in scripts"),
        ("EVAL", "has no INFO in scripts (unknown command 'EVAL'), but needs INFO in scripts"),
        ("HELLO", "refuses a command that connections need (unknown command 'HELLO')"),
    ],
)
async def test_a_command_that_a_provider_has_removed_is_a_mistake_and_no_outage(
    tmp_path: Path, redis_server: RedisServer, command: str, expected: str
) -> None:
    options = ("--rename-command", command, "")
    with RedisServer(tmp_path, binary=redis_server.binary, options=options) as server:
        client = redis_client.connect(server.url)
        with pytest.raises(UnmetRequirement, match=f"^Redis {re.escape(expected)}: "):
            require_redis(*await redis_facts.read(client))
        await client.aclose()


@pytest.mark.parametrize("name", [b"run_id", b"master_replid2"])
async def test_a_redis_that_hides_its_run_is_a_mistake_and_has_no_clock(
    redis_server: RedisServer, name: bytes
) -> None:
    async with Proxy(redis_server.port).serve() as proxy:
        proxy.rename(name + b":", name[:-1] + b"X:")
        client = redis_client.connect(f"redis://127.0.0.1:{proxy.port}/0")
        with pytest.raises(UnmetRequirement, match=f"INFO has no {name.decode()}"):
            require_redis(*await redis_facts.read(client))
        with pytest.raises(RedisUnavailable, match=f"INFO has no {name.decode()}"):
            await Inventory(client).clocks()
        await client.aclose()


async def test_a_redis_that_is_away_is_an_outage() -> None:
    client = redis_client.connect("redis://127.0.0.1:1/0")
    with pytest.raises(RedisUnavailable):
        await redis_facts.read(client)
    await client.aclose()


@pytest.mark.parametrize("version", ["6.2.14", "5.0.7", "2.8"])
def test_a_redis_below_7_0_is_refused(version: str) -> None:
    with pytest.raises(UnmetRequirement, match=f"Redis has version {version}, but needs version"):
        require_redis(replace(GOOD_REDIS, version=version, script_error="ERR syntax error"))


@pytest.mark.parametrize("version", ["7.0.0", "7.2.4", "8.2.3", "10.0.0", None])
def test_newer_and_unknown_versions_of_redis_are_accepted(version: str | None) -> None:
    require_redis(replace(GOOD_REDIS, version=version, backlog_ttl=None, policy=None))


async def test_a_database_that_is_not_utf_8_is_refused(postgres_server: PostgresServer) -> None:
    name = f"latin_{uuid.uuid4().hex}"
    admin = await asyncpg.connect(postgres_server.url)
    await admin.execute(
        f"CREATE DATABASE {name} ENCODING 'LATIN1' LOCALE_PROVIDER libc LOCALE 'C' "
        "TEMPLATE template0"
    )
    try:
        with pytest.raises(UnmetRequirement, match="PostgreSQL has encoding LATIN1, but needs"):
            await require_ledger(f"{postgres_server.url.rpartition('/')[0]}/{name}")
    finally:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await admin.close()


@asynccontextmanager
async def database_user(url: str, *grants: str) -> AsyncIterator[str]:
    """Yield the address of a role with these rights in the database of `url`."""
    role = f"role_{uuid.uuid4().hex}"
    admin = await asyncpg.connect(url)
    await admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'secret'")
    for grant in grants:
        await admin.execute(grant.format(role=role))
    parts = urlsplit(url)
    try:
        yield f"postgresql://{role}:secret@{parts.hostname}:{parts.port}{parts.path}"
    finally:
        await admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
        await admin.close()


async def test_a_role_that_may_not_migrate_is_told_the_right(database_url: str) -> None:
    async with database_user(database_url) as url:
        with pytest.raises(UnmetRequirement, match=r"schema public, but needs the right CREATE"):
            await require_ledger(url)


async def test_a_role_that_may_only_read_and_write_uses_a_migrated_ledger(
    database_url: str,
) -> None:
    pool = await ledger.connect(database_url)
    await schema.migrate(pool)
    await pool.close()
    grant = "GRANT {} ON ALL TABLES IN SCHEMA public TO {{role}}"
    async with database_user(database_url, grant.format("SELECT, INSERT, UPDATE, DELETE")) as url:
        await require_ledger(url)
    async with database_user(database_url, grant.format("SELECT")) as url:
        with pytest.raises(UnmetRequirement, match="no right for INSERT on engine, INSERT"):
            await require_ledger(url)


async def test_a_database_that_is_away_is_an_outage() -> None:
    with pytest.raises(LedgerUnavailable):
        await require_ledger("postgresql://u:p@127.0.0.1:1/db")


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (TopicFacts(1, {}), "only 1 of the topic, but needs 12 or more partitions of the topic"),
        (TopicFacts(12, {"retention.ms": "3600000"}), "retention.ms=3600000, but needs"),
        (TopicFacts(12, {"retention.bytes": "1000000"}), "retention.bytes=1000000, but needs"),
        (TopicFacts(12, {"retention.bytes": "-1"}), "retention.bytes=-1, but needs a limit"),
        (TopicFacts(12, {"cleanup.policy": "compact"}), "cleanup.policy=compact, but needs"),
        (TopicFacts(12, CREATE_TIME), "message.timestamp.type=CreateTime, but needs"),
        (TopicFacts(12, {"max.message.bytes": "1000"}), "max.message.bytes=1000, but needs"),
    ],
)
def test_a_topic_with_other_settings_is_warned_of_once(
    facts: TopicFacts, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    checks = Checks(logging.getLogger("test"))
    for _ in range(3):
        checks.require(requirements.topic(), facts)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert words in record.message


def test_a_topic_with_more_than_the_requirements_is_accepted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = {
        "retention.ms": "-1",
        "retention.bytes": "2147483648",
        "cleanup.policy": "compact,delete",
        "message.timestamp.type": "LogAppendTime",
        "max.message.bytes": "1048588",
        "compression.type": "zstd",
    }
    Checks(logging.getLogger("test")).require(requirements.topic(), TopicFacts(64, config))
    assert not caplog.records


def broken() -> list[tuple[str, Finding]]:
    """Return each requirement's rule with its only finding on a server that breaks it."""
    cases: list[tuple[Sequence[Requirement[Any]], Sequence[object]]] = [
        (
            requirements.REDIS,
            [
                replace(GOOD_REDIS, version="6.2.14"),
                replace(GOOD_REDIS, script_error="ERR no permissions"),
                replace(GOOD_REDIS, policy="volatile-ttl"),
                replace(GOOD_REDIS, backlog_ttl="60"),
                replace(GOOD_REDIS, appendonly=False),
                replace(GOOD_REDIS, cluster=replace(GOOD_CLUSTER, covered=1)),
                *(
                    replace(GOOD_REDIS, cluster=replace(GOOD_CLUSTER, config={name: value}))
                    for name, value in (
                        ("cluster-node-timeout", "5001"),
                        ("cluster-require-full-coverage", "yes"),
                        ("cluster-allow-reads-when-down", "yes"),
                        ("min-replicas-to-write", "1"),
                    )
                ),
            ],
        ),
        (
            requirements.LEDGER,
            [
                replace(GOOD_LEDGER, version=130_011),
                replace(GOOD_LEDGER, encoding="SQL_ASCII"),
                replace(GOOD_LEDGER, outdated=True, may_create=False),
                replace(GOOD_LEDGER, lacking=("INSERT on sales",)),
            ],
        ),
        (
            requirements.topic(),
            [
                TopicFacts(11, {}),
                TopicFacts(12, {"retention.ms": "604799999"}),
                TopicFacts(12, {"retention.bytes": "0"}),
                TopicFacts(12, {"retention.bytes": "-1"}),
                TopicFacts(12, {"cleanup.policy": "compact"}),
                TopicFacts(12, CREATE_TIME),
                TopicFacts(12, {"max.message.bytes": "262143"}),
            ],
        ),
        (
            requirements.RECORDED,
            [
                TopicFacts(1, {"retention.ms": "0"}),
                TopicFacts(1, CREATE_TIME),
                TopicFacts(1, {"max.message.bytes": "0"}),
            ],
        ),
    ]
    found = []
    for table, servers in cases:
        for requirement, facts in zip(table, servers, strict=True):
            [finding] = [each for each in findings(table, facts) if each.verdict != "ok"]
            assert finding == requirement.check(facts)
            found.append((f"{requirement.server} | {requirement.rule}", finding))
    return found


def test_each_line_of_the_install_page_is_one_check_with_its_consequence() -> None:
    page = (ROOT / "docs/install.md").read_text().replace("`", "")
    section = page.partition("### Requirements")[2].partition("\n### ")[0]
    lines = re.findall(
        r"^\| ((?:Redis|Redis Cluster|PostgreSQL|Kafka) \| [^|]+) \| (\w+)", section, re.MULTILINE
    )
    words = {"failure": "refused", "warning": "a"}  # the page says "a warning"
    assert lines == [(rule, words[finding.verdict]) for rule, finding in broken()]
    for _, finding in broken():
        assert " but needs " in finding.text
        assert ": " in finding.text  # the remedy
