"""A release of the chart on a real cluster, its load tests and their journals."""

import json
import os
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from dev.cluster.node import Cluster
from tests.support.eventually import eventually
from tests.support.manifests import flash_sale, with_stand_ins
from tests.support.paths import ROOT

HERE: Final = Path(__file__).parent
NAMESPACE: Final = "shop"
RELEASE: Final = "shop"
CHANGED: Final = "changed"
"""The tag of a second image of each deployable, for upgrades."""
COMPONENTS: Final = ("api", "consumer", "operator")
SECONDS: Final = 120.0
"""How long a rollout may take, or a load test to begin or to end. A test that meets it fails."""
PAUSE_SECONDS: Final = 0.5
"""How often kubectl asks for a state."""
MORE: Final = 20
"""How many buyers must get a unit before a load test ends."""

WAIT: Final = ("--wait", "--timeout=2m")

Object = dict[str, Any]


def block(name: str, page: str = "install") -> str:
    """Return a block of a page of docs/, which a comment above it names."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return text.partition(f"<!-- e2e: {name} -->")[2].split("```")[1].partition("\n")[2]


def commands(name: str, page: str = "install") -> list[str]:
    """Return the commands of a block in a page of docs/."""
    lines = block(name, page).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.strip()]


@dataclass(frozen=True, slots=True)
class Promise:
    """One 202 in the journal of a load test."""

    reservation: str
    user: str
    key: str


@dataclass(frozen=True, slots=True)
class Shop:
    """Runs commands on the cluster, in the namespace of the release."""

    cluster: Cluster
    namespace: str = NAMESPACE
    release: str = RELEASE

    def shell(self, command: str) -> str:
        """Run a command of the documents and return its output. A failure fails the test."""
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
        """Run kubectl or helm and return its output.

        A failing command fails the test. Without `check`, its command line and output are returned.
        """
        done = subprocess.run(
            [self.cluster.commands / program, "--namespace", self.namespace, *arguments],
            cwd=ROOT,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
        )
        failure = f"{program} {' '.join(arguments)}: {done.stdout}{done.stderr}"
        assert done.returncode == 0 or not check, failure
        return done.stdout if done.returncode == 0 else failure

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
        """Install the release with the command in docs/install.md."""
        (command,) = (each for each in commands("install") if each.startswith("helm install"))
        self.shell(command)

    def create_namespace(self) -> None:
        """Create the namespace of the release. It refuses unrestricted pods."""
        self.kubectl("create", "namespace", self.namespace)
        enforce = "pod-security.kubernetes.io/enforce=restricted"
        self.kubectl("label", "namespace", self.namespace, enforce)

    def start_servers(self) -> None:
        """Start a Redis and a PostgreSQL of k8s/, with requests that fit the node."""
        for name in ("development-secrets", "redis/one-node", "postgres/one-node"):
            for each in with_stand_ins(Path(f"k8s/{name}.yaml")):
                self.apply(each)
        for server in ("redis", "postgres"):
            self.kubectl("rollout", "status", f"statefulset/{server}", "--timeout=2m")

    def images(self) -> set[str]:
        """Return the image tags of the release's pods."""
        pods = self.get("pods", f"--selector=app.kubernetes.io/instance={self.release}")["items"]
        return {each["spec"]["containers"][0]["image"].rpartition(":")[2] for each in pods}

    def declare(self, name: str, stock: int) -> None:
        """Apply a sale of an item of the same name and wait until it sells."""
        self.apply(flash_sale(name, stock=stock, paused=False))
        self.until_sale(name, "Selling")

    def until(self, look: Callable[[], object], expected: str, seconds: float = SECONDS) -> None:
        """Poll the cluster until `look` returns a true result."""
        eventually(look, expected, seconds=seconds, pause=PAUSE_SECONDS)

    def until_sale(self, name: str, state: str) -> None:
        """Wait until `kubectl get fs` shows a state."""

        def shown() -> bool:
            return state in self.kubectl("get", "fs", name, "--no-headers").split()

        self.until(shown, f"the sale {name} is {state}")

    def start_load(self, job: str, script: str, **variables: object) -> None:
        """Start loadtest/job.yaml with another script or other variables. Does not wait for it."""
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
        env = {each["name"]: each for each in container["env"]}
        service = f"http://{self.release}-flashsale"
        variables = {"API_URL": f"{service}-api", "ORDERS_URL": f"{service}-orders", **variables}
        env |= {name: {"name": name, "value": str(value)} for name, value in variables.items()}
        container["env"] = list(env.values())
        # A node with two cores also runs the engine and its servers.
        container["resources"]["requests"]["cpu"] = "50m"
        self.apply(manifest)

    def start_buyers(self, sale: str, until: str = "paused", **variables: object) -> None:
        """Send persistent buyers to a sale until it refuses them so, and wait for the first 202."""
        variables = {"ITEM_ID": sale, "UNTIL": until, **variables}
        self.start_load(sale, "persistent.js", **variables)
        self.sell_more(sale)

    def sell_more(self, sale: str) -> None:
        """Wait until more of the buyers that were sent to a sale get a unit."""
        count = len(self.promises(sale)) + MORE
        self.until(lambda: len(self.promises(sale)) >= count, f"{sale} sells {MORE} units more")

    def end_buyers(self, sale: str) -> list[Promise]:
        """Pause a sale once more buyers have got a unit, and return the journal of its buyers."""
        self.sell_more(sale)
        paused = json.dumps({"spec": {"paused": True}})
        self.kubectl("patch", f"flashsale/{sale}", "--type=merge", f"--patch={paused}")
        return self.end_load(sale)

    def end_load(self, job: str) -> list[Promise]:
        """Wait until a load test ends and return its journal. Its thresholds must have passed."""
        kinds: list[str] = []

        def ended() -> bool:
            conditions = self.get("job", job).get("status", {}).get("conditions", [])
            kinds[:] = [each["type"] for each in conditions]
            return "Complete" in kinds or "Failed" in kinds

        self.until(ended, f"{job} ends")
        print(self.summary(job))
        assert "Complete" in kinds, self.summary(job)
        return self.promises(job)

    def promises(self, job: str) -> list[Promise]:
        lines = self.kubectl("logs", f"job/{job}", check=False).splitlines()
        read = [json.loads(line) for line in lines if line.startswith('{"reservationId"')]
        return [Promise(each["reservationId"], each["userId"], each["key"]) for each in read]

    def summary(self, job: str) -> str:
        """Return k6's output without the journal."""
        lines = self.kubectl("logs", f"job/{job}", check=False).splitlines()
        return "\n".join(line for line in lines if not line.startswith("{"))

    def rows(self, sale: str, columns: str) -> list[list[Any]]:
        """Return columns of each of a sale's reservations in the ledger."""
        query = (
            f"SELECT json_build_array({columns}) FROM reservations "
            f"WHERE sale_id = '{self.namespace}/{sale}'"
        )
        psql = ("psql", "--username=flashsale", "--tuples-only", "--no-align", f"--command={query}")
        lines = self.kubectl("exec", "postgres-0", "--", *psql).splitlines()
        return [json.loads(line) for line in lines]

    def ledger(self, sale: str) -> list[tuple[str, str, int]]:
        """Return the reservation, user and quantity of each accepted row of a sale."""
        rows = self.rows(sale, "reservation_id, user_id, quantity, state")
        return [(row[0], row[1], row[2]) for row in rows if row[3] in ("held", "confirmed")]

    def check(self, sale: str, stock: int, promises: Iterable[Promise]) -> None:
        """Check that nothing was oversold and that the ledger has the promised reservations only.

        This requires a load test that repeats each request until it gets an answer.
        """
        promised = {each.reservation: each for each in promises}
        keys = Counter((each.user, each.key) for each in promised.values() if each.key)
        assert not [key for key, count in keys.items() if count > 1], "a key with two reservations"

        def recorded() -> bool:
            return {row[0] for row in self.ledger(sale)} >= promised.keys()

        self.until(recorded, f"the ledger has all {len(promised)} reservations of {sale}")
        rows = self.ledger(sale)
        assert {row[0] for row in rows} == promised.keys(), "rows without a 202"
        assert len(rows) == len(promised)
        assert {row[0]: row[1] for row in rows} == {
            each.reservation: each.user for each in promised.values()
        }
        assert max(Counter(row[1] for row in rows).values()) == 1, "a buyer has two units"
        assert sum(row[2] for row in rows) <= stock, "oversold"

    def pods(self, component: str) -> list[str]:
        """Return the names of a component's pods."""
        selector = f"--selector=app.kubernetes.io/component={component}"
        return self.kubectl("get", "pods", selector, "--output=name").split()

    def flashsalectl(self, *arguments: str, check: bool = True) -> str:
        """Run `flashsalectl` in the operator's pod and return its output."""
        cli = ("exec", f"deployment/{self.release}-flashsale-operator", "--", "flashsalectl")
        return self.kubectl(*cli, *arguments, check=check)

    def audit(self) -> str:
        return self.flashsalectl("audit")

    def agrees(self) -> None:
        """Wait until the audit reports ok for every sale."""

        def ok() -> bool:
            _, *sales = self.flashsalectl("audit", check=False).splitlines()
            return bool(sales) and all(line.endswith("ok") for line in sales)

        self.until(ok, "the audit reports ok for every sale")

    def roll_out(self, *components: str) -> None:
        """Wait until all pods of the components are up to date and ready."""
        for component in components or COMPONENTS:
            name = f"deployment/{self.release}-flashsale-{component}"
            self.kubectl("rollout", "status", name, f"--timeout={SECONDS:.0f}s")
