"""Requests made up from the API's own description, good and bad, by schemathesis.

More of them: FLASHSALE_FUZZ_EXAMPLES=2000, and other ones each time: FLASHSALE_FUZZ_RANDOM=1.
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
    """The sale that all these requests are for, seeded when it is not there."""

    async def look() -> Sale:
        client = redis_client.connect(server.url)
        stock = Inventory(client)
        spec = SaleSpec(f"default/{ITEM}", ITEM, UNITS, max_per_user=1_000)
        assert await stock.apply(spec, 1, seed_until_ms=2**53) in (
            Applied.SEEDED,
            Applied.UNCHANGED,
        )
        sale = (await stock.sales([ITEM]))[ITEM]
        await client.aclose()
        return sale

    return asyncio.run(look())


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
        # Where nothing can be sent, nothing can be wrong.
        if mode is GenerationMode.POSITIVE or "{" in label or operation.body
    ],
)
def test_made_up_requests_are_answered_as_described(
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
    def ask(case: Case[Any]) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            # To JSON Schema 2.0 is an integer too.
            quantity = int(str(case.body["quantity"]).partition(".")[0])
            case.body |= {"itemId": ITEM, "quantity": quantity}
            if "Idempotency-Key" in case.headers:
                case.headers["Idempotency-Key"] = f"key-{quantity}"  # not for another quantity
        answer = case.call_and_validate(base_url=api.url, session=session, timeout=20)
        if answer.status_code == 202:
            said = answer.json()
            sold[said["reservationId"]] = said["quantity"]

    ask()
    after = sale_of(redis_server)
    assert after.accepted == before.accepted + sum(sold.values())
    if "/reserve" in label:
        assert bool(sold) == (mode is GenerationMode.POSITIVE)
    assert b"Traceback" not in api.log.read_bytes()
