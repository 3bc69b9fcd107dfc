"""One operator in a namespace of its own, with what it works on and who watches it."""

import asyncio
import http.client
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import asyncpg
import redis as redis_client
import yaml

from dev.cluster.control_plane import ControlPlane
from dev.services import Addresses, ApiServer, ConsumerServer, OperatorServer
from dev.stack.servers import RedisServer, Server
from flashsale.keys import ItemKeys
from tests.support.paths import ROOT

CRD = ROOT / "charts" / "flashsale" / "files" / "crd.yaml"
RULES = ROOT / "charts" / "flashsale" / "files" / "operator-rules.yaml"
DEADLINE_SECONDS = 90.0

T = TypeVar("T")
S = TypeVar("S", bound=Server)


def eventually(
    look: Callable[[], T | None],
    what: Callable[[], str] = str,
    seconds: float = DEADLINE_SECONDS,
) -> T:
    """What `look` finds, as soon as it finds something; `what` says what there was instead."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not in {seconds:.0f} s: {what() or look}"
        time.sleep(0.1)
    return found


def rules() -> dict[str, list[dict[str, list[str]]]]:
    """The rules that the chart will install."""
    loaded: dict[str, list[dict[str, list[str]]]] = yaml.safe_load(RULES.read_text())
    return loaded


def in_seconds(seconds: float) -> str:
    """An RFC 3339 time that far from now."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


@dataclass
class World:
    """A namespace with an operator of its own."""

    plane: ControlPlane
    namespace: str
    redis: RedisServer
    addresses: Addresses
    folder: Path
    kubeconfig: Path
    services: list[Server] = field(default_factory=list)

    def operator(self, **environment: str) -> OperatorServer:
        """One more operator, started."""
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

    def api(self) -> ApiServer:
        """An API process, started."""
        return self._started(ApiServer(self.folder / f"api-{len(self.services)}", self.addresses))

    def consumer(self) -> ConsumerServer:
        """A consumer process, started."""
        data = self.folder / f"consumer-{len(self.services)}"
        return self._started(ConsumerServer(data, self.addresses))

    def _started(self, service: S) -> S:
        service.start()
        self.services.append(service)
        return service

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """What the administrator's kubectl prints in the namespace."""
        done = self.plane.kubectl("-n", self.namespace, *arguments, stdin=stdin, check=check)
        return done.stdout + ("" if check else done.stderr)

    def apply(self, name: str, item: str | None = None, **spec: object) -> None:
        """`kubectl apply` of one FlashSale."""
        self.kubectl("apply", "-f", "-", stdin=json.dumps(self.manifest(name, item, **spec)))

    def manifest(self, name: str, item: str | None = None, **spec: object) -> dict[str, Any]:
        return {
            "apiVersion": "flashsale.dev/v1alpha1",
            "kind": "FlashSale",
            "metadata": {"name": name, "namespace": self.namespace},
            "spec": {"itemId": item or name, "stock": 10, **spec},
        }

    def delete(self, name: str) -> None:
        """`kubectl delete`, which waits until the object is gone."""
        self.kubectl("delete", "fs", name, "--timeout=30s")

    def get(self, name: str) -> dict[str, Any]:
        """The live object."""
        return cast("dict[str, Any]", json.loads(self.kubectl("get", "fs", name, "-o", "json")))

    def condition(self, name: str, kind: str) -> dict[str, Any]:
        """A condition of the current generation, or an empty one."""
        live = self.get(name)
        for condition in live.get("status", {}).get("conditions", []):
            of_now = condition["observedGeneration"] == live["metadata"]["generation"]
            if condition["type"] == kind and of_now:
                return cast("dict[str, Any]", condition)
        return {}

    def until(self, name: str, *, state: str = "", ready: str = "") -> dict[str, Any]:
        """The object once Open has the reason `state` and Ready the reason `ready`."""

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
        """The reasons of the object's Events, each as often as it was told."""
        listed = json.loads(
            self.kubectl(
                *("get", "events", "-o", "json"),
                *("--field-selector", f"involvedObject.name={name},involvedObject.kind=FlashSale"),
            )
        )
        told = sorted(listed["items"], key=lambda each: int(each["metadata"]["resourceVersion"]))
        return [event["reason"] for event in told for _ in range(event["count"])]

    def sale(self, item: str) -> dict[str, str]:
        """The item's sale hash in Redis."""
        client = redis_client.Redis.from_url(self.redis.url, decode_responses=True)
        with client:
            return cast("dict[str, str]", client.hgetall(ItemKeys.of(item).sale))

    def on_ledger(self, query: str, *arguments: object) -> Any:  # noqa: ANN401 - any value
        """The value of a query."""

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
        self.kubectl("delete", "fs", "--all", "--wait=false", check=False)


def reserve(
    api: ApiServer, item: str, user: str = "", quantity: int = 1, key: str = ""
) -> tuple[int, str]:
    """POST /reserve: the status code, and the last word of the problem's type."""
    body = {"userId": user or f"u-{uuid.uuid4()}", "itemId": item, "quantity": quantity}
    headers = {"Content-Type": "application/json", **({"Idempotency-Key": key} if key else {})}
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=10)
    try:
        connection.request("POST", "/reserve", json.dumps(body), headers)
        answer = connection.getresponse()
        said = json.loads(answer.read())
        return answer.status, str(said.get("type", "")).rpartition("/")[2].rpartition(":")[2]
    finally:
        connection.close()


def reserve_until(api: ApiServer, item: str, expected: tuple[int, str], user: str = "") -> None:
    """Asks until that is the answer: what a pod has cached is old for a moment.

    As new users, who may buy meanwhile, or as one `user`.
    """
    answers = []

    def look() -> bool:
        answers.append(reserve(api, item, user))
        return answers[-1] == expected

    eventually(look, lambda: f"{item}: {expected}, but {answers[-3:]}")
