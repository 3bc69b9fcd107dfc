"""Check that the ledger and Redis belong to this engine before a sale is touched."""

from contextlib import suppress

from flashsale import ledger, redis_facts, requirements
from flashsale.errors import ContractViolation, OtherEngine, RedisUnavailable
from flashsale.inventory import Inventory
from flashsale.requirements import Checks
from flashsale_operator.sales import index


async def claimed_id(inventory: Inventory, pool: ledger.Pool) -> str:
    """Returns the engine's id, after Redis is claimed for the engine.

    Raises `OtherEngine` if the ledger or Redis belongs to another engine, `RedisMoved` if the sales
    are in the Redis at another address, `LedgerUnavailable` and `RedisUnavailable`.
    """
    own = await ledger.engine_id(pool, inventory.engine, inventory.address)
    await claim(inventory, pool, own)
    return own


async def require_own(inventory: Inventory, pool: ledger.Pool) -> None:
    """Raises the errors of `claimed_id`, but claims nothing.

    The Redis of this engine may have another address here, such as a port-forward's. Only if it
    has no id, because it lost its keys or is another one, the address must be the ledger's.
    """
    own = await ledger.engine_id(pool, inventory.engine, claim=False)
    await inventory.nodes.all()  # raises RedisUnavailable if all are away, which is no other Redis
    with suppress(RedisUnavailable):  # the node with the id is away
        if await inventory.index.engine_id() != own:
            await inventory.index.claimed(own)  # raises OtherEngine
            await ledger.engine_id(pool, inventory.engine, inventory.address, claim=False)


async def claim(inventory: Inventory, pool: ledger.Pool, own: str) -> None:
    """Claims Redis for the engine with the id `own`, unless this run of the server is claimed.

    To an API pod, an item is unknown if a claimed Redis does not index it. So all items of the
    ledger are added at the moment of the claim. A restarted Redis can be an older copy that lacks
    some, so it is claimed again. Raises `OtherEngine` if another engine has claimed
    Redis, `LedgerUnavailable` and `RedisUnavailable`.
    """
    if not await inventory.index.claimed(own):
        await inventory.index.claim(own, await index.wanted(pool))


async def require_redis(checks: Checks, inventory: Inventory) -> None:
    """Raises `UnmetRequirement` if Redis lacks a requirement, and `RedisUnavailable`."""
    checks.require(requirements.REDIS, *await redis_facts.read(inventory.redis, inventory.engine))


def require_own_sale(answer: str, item_id: str) -> None:
    """Raises an error if a script has refused the item's sale in Redis, by its answer.

    Raises `OtherEngine` if another engine has the sale, and `ContractViolation` if this version
    does not support its format.
    """
    if answer == "other_engine":
        raise OtherEngine(
            f"{item_id}: another engine of the same name has this item in Redis: give each engine "
            "a Redis of its own, or another FLASHSALE_ENGINE"
        )
    if answer == "unsupported":
        raise ContractViolation(f"{item_id}: Redis has a sale that this version cannot read")
