"""Valid and invalid requests that schemathesis generates from the API's OpenAPI document.

FLASHSALE_FUZZ_EXAMPLES sets their number per operation (100), and FLASHSALE_FUZZ_RANDOM=1 makes
them differ in each run. Needs Redis.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.core.result import Ok

from dev.services import ApiServer
from dev.stack.servers import RedisServer
from flashsale import redis_client
from flashsale.inventory import Applied, Inventory
from flashsale.sale import Sale, SaleSpec

EXAMPLES = int(os.environ.get("FLASHSALE_FUZZ_EXAMPLES", "100"))
RANDOM = os.environ.get("FLASHSALE_FUZZ_RANDOM") == "1"
ITEM = "fuzzed"
UNITS = 1_000_000

DESCRIPTION = schemathesis.openapi.from_dict(
    json.loads((files("flashsale_api") / "openapi.json").read_bytes())
)
OPERATIONS = {
    operation.ok().label: operation.ok()
    for operation in DESCRIPTION.get_all_operations()
    if isinstance(operation, Ok)
}

bounded = settings(
    max_examples=EXAMPLES,
    derandomize=not RANDOM,
    database=None,
    deadline=None,
    phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if RANDOM else [])],
    suppress_health_check=list(HealthCheck),
)


def sale_of(server: RedisServer) -> Sale:
    """Return the sale of all these requests. Seed it if it does not exist."""

    async def read() -> Sale:
        client = redis_client.connect(server.url)
        inventory = Inventory(client)
        spec = SaleSpec(f"default/{ITEM}", ITEM, UNITS, max_per_user=1_000)
        assert await inventory.apply(spec, 1, seed_until_ms=2**53) in (
            Applied.SEEDED,
            Applied.UNCHANGED,
        )
        sale = (await inventory.sales([ITEM]))[ITEM]
        await client.aclose()
        return sale

    return asyncio.run(read())


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


@pytest.mark.parametrize(
    ("label", "mode"),
    [
        (label, mode)
        for label, operation in sorted(OPERATIONS.items())
        for mode in GenerationMode
        # An operation without parameters and body has no invalid requests.
        if mode is GenerationMode.POSITIVE or "{" in label or operation.body
    ],
)
def test_generated_requests_get_documented_answers(
    api: ApiServer,
    redis_server: RedisServer,
    session: requests.Session,
    label: str,
    mode: GenerationMode,
) -> None:
    before = sale_of(redis_server)
    sold: dict[str, int] = {}

    @bounded
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    def send(case: Case[Any]) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            # JSON Schema also counts 2.0 as an integer.
            quantity = int(str(case.body["quantity"]).partition(".")[0])
            case.body |= {"itemId": ITEM, "quantity": quantity}
            if "Idempotency-Key" in case.headers:
                case.headers["Idempotency-Key"] = f"key-{quantity}"  # one quantity per key
        answer = case.call_and_validate(base_url=api.url, session=session, timeout=20)
        if answer.status_code == 202:
            reservation = answer.json()
            sold[reservation["reservationId"]] = reservation["quantity"]

    send()
    after = sale_of(redis_server)
    assert after.accepted == before.accepted + sum(sold.values())
    if "/reserve" in label:
        assert bool(sold) == (mode is GenerationMode.POSITIVE)
    assert b"Traceback" not in api.log.read_bytes()
