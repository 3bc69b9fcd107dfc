"""What a process of the operator is connected to."""

from dataclasses import dataclass

import asyncpg

from flashsale.inventory import Inventory
from flashsale_operator.kubernetes.client import Kube
from flashsale_operator.kubernetes.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Clients:
    """Made by the composition root, handed to what works with them."""

    kube: Kube
    inventory: Inventory
    pool: "asyncpg.Pool[asyncpg.Record]"
    metrics: Metrics
