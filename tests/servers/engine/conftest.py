"""Two API processes and two consumers per module, on the session's servers."""

from collections.abc import Iterator

import pytest

from dev.services import Addresses, ApiServer, ConsumerServer
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer
from tests.support.engine import Engine
from tests.support.redis_users import of_api


@pytest.fixture(scope="module")
def engine(
    tmp_path_factory: pytest.TempPathFactory,
    redis_server: RedisServer,
    kafka_server: KafkaServer,
    postgres_server: PostgresServer,
    addresses: Addresses,
) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    as_api = of_api(addresses)
    engine = Engine(
        redis=redis_server,
        kafka=kafka_server,
        postgres=postgres_server,
        apis=(ApiServer(folder / "api-1", as_api), ApiServer(folder / "api-2", as_api)),
        consumers=(
            ConsumerServer(folder / "consumer-1", addresses),
            ConsumerServer(folder / "consumer-2", addresses),
        ),
        addresses=addresses,
        folder=folder,
    )
    yield engine
    for service in (*engine.apis, *engine.consumers):
        service.kill()


@pytest.fixture(autouse=True)
def everything_runs(engine: Engine) -> None:
    """Start the processes that an earlier test stopped."""
    engine.start()
