"""A namespace with its own operator, Redis, ledger and, if a test asks for them, API pods."""

import asyncio
import http.client
import json
import uuid
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import asyncpg
import redis as redis_client
import yaml

from dev.cluster.control_plane import ControlPlane
from dev.services import Addresses, ApiServer, ConsumerServer, OperatorServer
from dev.stack.process import Server
from dev.stack.servers import RedisServer
from flashsale.keys import ItemKeys
from tests.support.eventually import eventually
from tests.support.manifests import flash_sale
from tests.support.paths import CHART_FILES
from tests.support.redis_users import of_api

RULES = CHART_FILES / "operator-rules.yaml"

S = TypeVar("S", bound=Server)


def rules() -> dict[str, list[dict[str, list[str]]]]:
    """Return the RBAC rules that the chart installs."""
    loaded: dict[str, list[dict[str, list[str]]]] = yaml.safe_load(RULES.read_text())
    return loaded


def in_seconds(seconds: float) -> str:
    """Return the RFC 3339 time `seconds` from now."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


@dataclass
class World:
    """A namespace and the processes that serve it."""

    plane: ControlPlane
    namespace: str
    redis: RedisServer
    addresses: Addresses
    folder: Path
    kubeconfig: Path
    services: list[Server] = field(default_factory=list)

    def operator(self, **environment: str) -> OperatorServer:
        """Start another operator."""
        return self._started(
            OperatorServer(
                self.folder / f"operator-{len(self.services)}",
                {
                    **self.addresses.environment(),
                    "KUBECONFIG": str(self.kubeconfig),
                    "FLASHSALE_NAMESPACES": self.namespace,
                    **environment,
                },
            )
        )

    def api(self, *, order_tokens: str = "") -> ApiServer:
        """Start an API process."""
        data = self.folder / f"api-{len(self.services)}"
        return self._started(ApiServer(data, of_api(self.addresses), order_tokens=order_tokens))

    def consumer(self) -> ConsumerServer:
        """Start a consumer process."""
        data = self.folder / f"consumer-{len(self.services)}"
        return self._started(ConsumerServer(data, self.addresses))

    def _started(self, service: S) -> S:
        service.start()
        self.services.append(service)
        return service

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """Run the administrator's kubectl in the namespace and return its output."""
        done = self.plane.kubectl("-n", self.namespace, *arguments, stdin=stdin, check=check)
        return done.stdout + ("" if check else done.stderr)

    def apply(self, name: str, item: str | None = None, **spec: object) -> None:
        """Run `kubectl apply` for one FlashSale."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps(self.manifest(name, item, **spec)))

    def manifest(self, name: str, item: str | None = None, **spec: object) -> dict[str, Any]:
        """Make a FlashSale of the namespace, of ten units unless `spec` has another stock."""
        return flash_sale(name, item, namespace=self.namespace, **{"stock": 10, **spec})

    def patch(self, name: str, **spec: object) -> None:
        """Change fields of one FlashSale's spec."""
        patch = json.dumps({"spec": spec})
        self.kubectl("patch", "fs", name, "--type=merge", "--patch", patch)

    def delete(self, name: str) -> None:
        """Run `kubectl delete`, which waits until the object is gone."""
        self.kubectl("delete", "fs", name, "--timeout=30s")

    def get(self, name: str) -> dict[str, Any]:
        """Return the live object."""
        return cast("dict[str, Any]", json.loads(self.kubectl("get", "fs", name, "-o", "json")))

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        """Return a condition of the current generation, or an empty one."""
        live = self.get(name)
        for condition in live.get("status", {}).get("conditions", []):
            current = condition["observedGeneration"] == live["metadata"]["generation"]
            if condition["type"] == kind and current:
                return cast("dict[str, Any]", condition)
        return {}

    def until(self, name: str, *, state: str = "", ready: str = "") -> dict[str, Any]:
        """Return the object once Open has the reason `state` and Ready the reason `ready`."""

        def look() -> bool:
            return (not state or self.condition(name, "Open").get("reason") == state) and (
                not ready or self.condition(name, "Ready").get("reason") == ready
            )

        eventually(look, lambda: f"{name} {state} {ready}, but {self.get(name).get('status')}")
        return self.get(name)

    def until_available(self, name: str, units: int) -> None:
        eventually(
            lambda: self.get(name).get("status", {}).get("available") == units,
            lambda: f"{name} has {units} available, but {self.get(name).get('status')}",
        )

    def events(self, name: str) -> list[str]:
        """Return the reasons of the object's Events in order, each as often as it occurred."""
        listed = json.loads(
            self.kubectl(
                "get",
                "events",
                "--output=json",
                f"--field-selector=involvedObject.name={name},involvedObject.kind=FlashSale",
            )
        )
        events = sorted(listed["items"], key=lambda each: int(each["metadata"]["resourceVersion"]))
        return [event["reason"] for event in events for _ in range(event["count"])]

    def sale(self, item: str) -> dict[str, str]:
        """Return the item's sale hash in Redis."""
        keys = ItemKeys.of(item, self.addresses.engine)
        client = redis_client.Redis.from_url(self.redis.url, decode_responses=True)
        with client:
            return cast("dict[str, str]", client.hgetall(keys.sale))

    def until_published(self, item: str) -> None:
        """Wait until Kafka has every event of the item, so that the outbox is empty."""
        outbox = ItemKeys.of(item, self.addresses.engine).outbox
        client = redis_client.Redis.from_url(self.redis.url)
        with client:
            eventually(lambda: client.xlen(outbox) == 0)

    def on_ledger(self, query: str, *arguments: object) -> Any:  # noqa: ANN401 - any value
        """Return the single value of a query."""

        async def fetch() -> Any:  # noqa: ANN401 - any value
            connection = await asyncpg.connect(self.addresses.database_url)
            try:
                return await connection.fetchval(query, *arguments)
            finally:
                await connection.close()

        return asyncio.run(fetch())

    def end(self) -> None:
        for service in reversed(self.services):
            service.kill()
        deleted = self.kubectl("delete", "fs", "--all", "--timeout=10s", check=False)
        assert "timed out" not in deleted, "a finalizer would keep the CRD from being deleted"


def reserve(
    api: ApiServer, item: str, user: str = "", quantity: int = 1, key: str = ""
) -> tuple[int, str]:
    """Send POST /reserve. Return the status code and the last word of the problem's type."""
    body = {"userId": user or f"u-{uuid.uuid4()}", "itemId": item, "quantity": quantity}
    headers = {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {})}
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=10)
    try:
        connection.request("POST", "/reserve", json.dumps(body), headers)
        answer = connection.getresponse()
        body_read = json.loads(answer.read())
        return answer.status, str(body_read.get("type", "")).rpartition("/")[2].rpartition(":")[2]
    finally:
        connection.close()


def reserve_until(api: ApiServer, item: str, expected: tuple[int, str], user: str = "") -> None:
    """Repeat a request until the answer is `expected`, because a pod's cache can be briefly old.

    Each request is from a new user, who may buy a unit, or always from `user`.
    """
    answers = []

    def look() -> bool:
        answers.append(reserve(api, item, user))
        return answers[-1] == expected

    eventually(look, lambda: f"{item}: {expected}, but {answers[-3:]}")
