"""PostgreSQL's listener, password and first start."""

import stat
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest

from dev.stack.errors import StackError
from dev.stack.servers import PostgresServer


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    data = tmp_path_factory.mktemp("postgres")
    # A private folder must do, although the server of root does not run as root.
    data.chmod(0o700)
    with PostgresServer(data / "data", durable=False) as server:
        yield server


async def test_it_listens_on_loopback_tcp_only(postgres: PostgresServer) -> None:
    connection = await asyncpg.connect(postgres.url)
    try:
        assert await connection.fetchval("SHOW listen_addresses") == "127.0.0.1"
        assert await connection.fetchval("SHOW unix_socket_directories") == ""
        assert await connection.fetchval("SELECT current_database()") == "flashsale"
        assert await connection.fetchval("SHOW synchronous_commit") == "on"
    finally:
        await connection.close()


async def test_a_wrong_password_is_refused(postgres: PostgresServer) -> None:
    password = (postgres.data / "password").read_text().strip()
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(postgres.url.replace(password, "guess"))


def test_only_the_owner_can_read_the_password_file(postgres: PostgresServer) -> None:
    assert stat.S_IMODE((postgres.data / "password").stat().st_mode) == 0o600


def test_the_url_is_unknown_before_the_first_start(tmp_path: Path) -> None:
    with pytest.raises(StackError, match="start it"):
        _ = PostgresServer(tmp_path).url


def test_a_start_after_an_interrupted_first_start_succeeds(tmp_path: Path) -> None:
    half = tmp_path / "cluster.new"
    half.mkdir()
    (half / "PG_VERSION").write_text("18\n")
    with PostgresServer(tmp_path, durable=False) as server:
        assert server.pid is not None
