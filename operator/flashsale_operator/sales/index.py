"""Keep Redis' index of items. An API pod takes an item of the index without keys for a lost one."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

from flashsale import ledger
from flashsale.inventory import Inventory
from flashsale.ledger import SaleRow
from flashsale_operator.sales.decision import has_keys, last_of_items

MARGIN: Final = timedelta(days=1)
"""How much longer than its keys are kept a closed sale is looked for in Redis."""

# A closed sale may have had its item last, or still have its keys.
_ROWS: Final = """
SELECT * FROM sales WHERE item_id = ANY($1::text[]) OR item_id IN (
  SELECT item_id FROM sales WHERE NOT closed OR held > 0 OR closed_at > now() - $2::interval)
ORDER BY sale_id
"""


async def wanted(pool: ledger.Pool) -> set[str]:
    """Returns the items that should have keys."""
    return _wanted(await _rows(pool, ()))


async def refresh(
    inventory: Inventory, pool: ledger.Pool, *, keep_closed: timedelta
) -> list[SaleRow]:
    """Adds the items that have keys or should have them, and removes the others.

    `keep_closed` is how long the keys of a closed sale are kept. Returns the rows of all sales of
    these items.
    """
    indexed = set(await inventory.index.items())
    rows = await _rows(pool, indexed, keep_closed + MARGIN)
    needed = _wanted(rows)
    await inventory.index.add(needed)
    others = indexed.union(row.item_id for row in rows) - needed
    without = set(await inventory.without_keys(others))
    await inventory.index.add(others - without)
    for item_id in without & indexed:
        await inventory.index.remove(item_id)
    return rows


async def _rows(
    pool: ledger.Pool, items: Iterable[str], closed_for: timedelta = timedelta()
) -> list[SaleRow]:
    async with ledger.translated():
        records = await pool.fetch(_ROWS, list(items), closed_for)
    return [SaleRow.of(record) for record in records]


def _wanted(rows: Sequence[SaleRow]) -> set[str]:
    last, now = last_of_items(rows), datetime.now(UTC)
    return {row.item_id for row in rows if has_keys(row, now, last=row.sale_id in last)}
