"""The sequences find each mistake in the scripts that the operator calls."""

import pytest

from dev.stack.servers import RedisServer
from tests.model.scripts.comparison import find
from tests.model.scripts.mutations import OF_OPERATORS
from tests.model.scripts.server import Fault

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fault", OF_OPERATORS, ids=lambda fault: f"{fault.script}: {fault.right}")
def test_a_mistake_in_a_script_is_found(fault: Fault, redis_server: RedisServer) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - any check may fail first
        find(fault, redis_server)
