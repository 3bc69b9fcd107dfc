"""The shop: a release of the chart on a real cluster, and what its crowd was promised."""

import json
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from dev.cluster.node import Cluster
from tests.support.paths import ROOT

HERE: Final = Path(__file__).parent
CHART: Final = ROOT / "charts" / "flashsale"
NAMESPACE: Final = "shop"
RELEASE: Final = "shop"
CHANGED: Final = "changed"
"""A tag under which the cluster has another image of each deployable."""
SECONDS: Final = 120.0

Object = dict[str, Any]


def eventually(what: str, look: Callable[[], object], seconds: float = SECONDS) -> None:
    """Looks until it is true; fails with what it saw last."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline, f"{what}: not after {seconds:.0f} s; last: {seen!r}"
        time.sleep(0.5)


def commands(block: str) -> list[str]:
    """Return the commands of a block in docs/install.md, which a comment above it names."""
    page = (ROOT / "docs" / "install.md").read_text()
    commands = page.partition(f"<!-- e2e: {block} -->")[2].split("```")[1]
    return [line for line in commands.replace("\\\n", " ").splitlines() if line]


@dataclass(frozen=True, slots=True)
class Promise:
    """One 202, as the crowd's journal has it."""

    reservation: str
    user: str
    key: str


@dataclass(frozen=True, slots=True)
class Shop:
    """Commands on the cluster, in the shop's namespace."""

    cluster: Cluster

    def shell(self, command: str) -> str:
        """Returns the output of a command of docs/install.md. Fails with the output on an error."""
        path = f"{self.cluster.commands}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def run(self, program: str, *arguments: str, stdin: str = "", check: bool = True) -> str:
        """What kubectl or helm prints; fails with its words if it does and `check`."""
        done = subprocess.run(
            [self.cluster.commands / program, "--namespace", NAMESPACE, *arguments],
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        said = f"{program} {' '.join(arguments)}: {done.stdout}{done.stderr}"
        assert done.returncode == 0 or not check, said
        return done.stdout if done.returncode == 0 else said

    def kubectl(self, *arguments: str, stdin: str = "", check: bool = True) -> str:
        return self.run("kubectl", *arguments, stdin=stdin, check=check)

    def helm(self, *arguments: str) -> str:
        return self.run("helm", *arguments)

    def get(self, *arguments: str) -> Object:
        found: Object = json.loads(self.kubectl("get", *arguments, "--output=json"))
        return found

    def apply(self, manifest: Object) -> None:
        self.kubectl("apply", "--filename=-", stdin=json.dumps(manifest))

    def install(self) -> None:
        """Installs the release as docs/install.md does."""
        (command,) = (each for each in commands("install") if each.startswith("helm install"))
        self.shell(command)

    def declare(self, name: str, stock: int) -> None:
        """Applies a sale of an item of that name, and waits until it is sold."""
        self.apply(
            {
                "apiVersion": "flashsale.dev/v1alpha1",
                "kind": "FlashSale",
                "metadata": {"name": name},
                "spec": {"itemId": name, "stock": stock},
            }
        )
        self.until_sale(name, "Selling")

    def until_sale(self, name: str, state: str) -> None:
        """Waits until `kubectl get fs` shows a state."""

        def shown() -> bool:
            return state in self.kubectl("get", "fs", name, "--no-headers").split()

        eventually(f"the sale {name} is {state}", shown)

    def start_load(self, job: str, script: str, **variables: object) -> None:
        """Starts loadtest/job.yaml with another script or other variables; returns at once."""
        sources = [ROOT / "loadtest", ROOT / "loadtest" / "lib", HERE]
        files = {path.name: path.read_text() for each in sources for path in each.glob("*.js")}
        scripts: Object = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "loadtest"},
        }
        self.apply({**scripts, "data": files})
        manifest: Object = yaml.safe_load((ROOT / "loadtest" / "job.yaml").read_text())
        manifest["metadata"]["name"] = job
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        container["args"][-1] = script
        own = {each["name"]: each for each in container["env"]}
        own |= {name: {"name": name, "value": str(value)} for name, value in variables.items()}
        container["env"] = list(own.values())
        # One that a node of two cores has left beside the shop.
        container["resources"]["requests"]["cpu"] = "50m"
        self.apply(manifest)

    def selling(self, job: str) -> None:
        """Waits until a load has been promised something."""
        eventually(f"{job} is promised something", lambda: self.promises(job))

    def still_selling(self, job: str) -> None:
        """Fails if the load has ended before what was to happen under it."""
        assert self.get("job", job)["status"].get("ready") == 1, f"{job} ended too early"

    def end_load(self, job: str, seconds: float = SECONDS) -> list[Promise]:
        """Waits for its end, which must be a success by its thresholds; returns its journal."""
        kinds: list[str] = []

        def ended() -> bool:
            conditions = self.get("job", job).get("status", {}).get("conditions", [])
            kinds[:] = [each["type"] for each in conditions]
            return "Complete" in kinds or "Failed" in kinds

        eventually(f"the end of {job}", ended, seconds)
        print(self.summary(job))
        assert "Complete" in kinds, self.summary(job)
        return self.promises(job)

    def promises(self, job: str) -> list[Promise]:
        lines = self.kubectl("logs", f"job/{job}", check=False).splitlines()
        read = [json.loads(line) for line in lines if line.startswith('{"reservationId"')]
        return [Promise(each["reservationId"], each["userId"], each["key"]) for each in read]

    def summary(self, job: str) -> str:
        """What k6 says at the end."""
        lines = self.kubectl("logs", f"job/{job}", check=False).splitlines()
        return "\n".join(line for line in lines if not line.startswith("{"))

    def ledger(self, sale: str) -> list[tuple[str, str, int]]:
        """Reservation, user and quantity of each row of a sale, as PostgreSQL has them."""
        query = (
            "SELECT json_build_array(reservation_id, user_id, quantity) FROM reservations "
            f"WHERE sale_id = '{NAMESPACE}/{sale}' AND state = 'accepted'"
        )
        psql = ("psql", "--username=flashsale", "--tuples-only", "--no-align", f"--command={query}")
        lines = self.kubectl("exec", "postgres-0", "--", *psql).splitlines()
        return [(row[0], row[1], row[2]) for row in map(json.loads, lines)]

    def check(self, sale: str, stock: int, promises: Iterable[Promise]) -> None:
        """Nothing was oversold, lost or duplicated: the ledger has what was promised, no more.

        That the rows are exactly the promises takes a crowd that gave up no request unanswered.
        """
        promised = {each.reservation: each for each in promises}
        keys = Counter((each.user, each.key) for each in promised.values() if each.key)
        assert not [key for key, count in keys.items() if count > 1], "a key with two reservations"

        def recorded() -> bool:
            return {row[0] for row in self.ledger(sale)} >= promised.keys()

        eventually(f"the ledger has all {len(promised)} reservations of {sale}", recorded)
        rows = self.ledger(sale)
        assert {row[0] for row in rows} == promised.keys(), "rows that nobody was promised"
        assert len(rows) == len(promised)
        assert {row[0]: row[1] for row in rows} == {
            each.reservation: each.user for each in promised.values()
        }
        assert max(Counter(row[1] for row in rows).values()) == 1, "a buyer has two"
        assert sum(row[2] for row in rows) <= stock, "oversold"

    def audit(self) -> str:
        """What flashsalectl, in the operator's pod, says of Redis, outbox, Kafka and ledger."""
        cli = ("flashsalectl", "audit")
        return self.kubectl("exec", f"deployment/{RELEASE}-flashsale-operator", "--", *cli)

    def roll_out(self, *components: str) -> None:
        """Waits until all pods are the wanted ones, and ready."""
        for component in components or ("api", "consumer", "operator"):
            name = f"deployment/{RELEASE}-flashsale-{component}"
            self.kubectl("rollout", "status", name, f"--timeout={SECONDS:.0f}s")
