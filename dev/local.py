"""`python -m dev.local`: run the whole engine on this machine, without Docker."""

import os
import signal

# A shell lets a background job ignore Ctrl-C.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the imports would have a traceback

import argparse
import asyncio
import json
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

import asyncpg

from dev.cluster.binaries import binaries
from dev.cluster.control_plane import ControlPlane
from dev.paths import LOCAL, ROOT
from dev.progress import ending_quietly
from dev.services import Addresses, ApiServer, ConsumerServer, OperatorServer, flashsalectl
from dev.stack import lifeline
from dev.stack.errors import StackError
from dev.stack.process import Server
from dev.stack.servers import KafkaServer, PostgresServer, RedisCluster, RedisServer
from flashsale_operator.ctl import local_env

SAMPLES: Final = ROOT / "k8s" / "samples"
SAMPLE: Final = SAMPLES / "iphone-15.yaml"
FIRST_SALES: Final = (SAMPLE, SAMPLES / "concert-tickets.yaml")
"""The sales that `up` declares: one without holds and one with them."""
CRD: Final = ROOT / "charts" / "flashsale" / "files" / "crd.yaml"
RESOURCE: Final = "flashsales.flashsale.dev"
API_PORT: Final = 8080
METRICS_OFFSET: Final = 1010
"""The API's metrics are on a port this much above the API's: 9090 by default."""
ORDERS_OFFSET: Final = 3
"""The port for the shop's order service is this much above the API's: 8083 by default."""
END_SECONDS: Final = 15.0
SERVERS: Final[tuple[type[Server], ...]] = (
    OperatorServer,
    ControlPlane,
    ApiServer,
    ConsumerServer,
    KafkaServer,
    PostgresServer,
    RedisServer,
)
CLUSTER: Final = "cluster"
"""The value of REDIS for a Redis Cluster instead of one server."""
ADDRESSES: Final = ("FLASHSALE_REDIS_URL", "FLASHSALE_KAFKA_BOOTSTRAP", "FLASHSALE_DATABASE_URL")
ENGINE: Final[tuple[type[Server], ...]] = (ApiServer, ConsumerServer, OperatorServer)
"""The processes that use the addresses."""
_ENV: Final = LOCAL / "env"
_MARK: Final = "FLASHSALE_CHECKOUT"
"""Names the checkout in the environment of each process of `up`. So `down` finds the processes even
if .local was moved or removed."""


def start_stack(
    data: Path,
    environ: Mapping[str, str],
    started: Callable[[Server], None],
    *,
    clustered: bool = False,
    detached: bool = False,
) -> Addresses:
    """Start Redis, Kafka and PostgreSQL in folders of `data`, and return their addresses.

    If `clustered`, Redis is a cluster of three primaries with a replica each. A server whose
    address is set in `environ` is not started. `started` is called with each server that this call
    starts, before its start, but not with servers that were already running.
    """
    cluster = RedisCluster(data / RedisCluster.name, replicas=1, detached=detached)
    redis = (
        cluster.servers[0] if clustered else RedisServer(data / RedisServer.name, detached=detached)
    )
    kafka = KafkaServer(data / KafkaServer.name, detached=detached)
    postgres = PostgresServer(data / PostgresServer.name, detached=detached)
    kinds: tuple[tuple[Server, Callable[[], str]], ...] = (
        (redis, lambda: redis.url),
        (kafka, lambda: kafka.bootstrap),
        (postgres, lambda: postgres.url),
    )
    addresses = []
    for variable, (server, address) in zip(ADDRESSES, kinds, strict=True):
        named = environ.get(variable)
        # If the user has sourced .local/env, the variables name the servers of an earlier `make
        # up`. Those servers are ours to start.
        if named is None or (server.data.exists() and named == address()):
            _start(server, started)
            if clustered and server is redis:
                for other in cluster.servers[1:]:
                    _start(other, started)
                cluster.form()
            named = address()
        else:
            print(f"  {server.name:9} not started, because {variable} names another", flush=True)
        addresses.append(named)
    return Addresses(*addresses)


async def _declared(addresses: Addresses) -> set[str]:
    """Return the ids of the sales in the ledger, which the consumer has created."""
    connection = await asyncpg.connect(addresses.database_url)
    try:
        return {row["sale_id"] for row in await connection.fetch("SELECT sale_id FROM sales")}
    finally:
        await connection.close()


def running_engine() -> tuple[Addresses, dict[str, str]]:
    """Return the addresses of the servers that `up` started, and the variables of .local/env.

    Raises StackError if the engine is not running.
    """
    written = read_variables(_ENV)
    running = ApiServer.attach(LOCAL / ApiServer.name).pid is not None
    if not running or any(variable not in written for variable in ADDRESSES):
        raise StackError("the engine is not running; start it with `make up`")
    return Addresses(*(written[variable] for variable in ADDRESSES)), written


def _chosen(environ: Mapping[str, str], written: Mapping[str, str]) -> dict[str, str]:
    """Return the addresses of servers that `up` must not choose itself.

    While a process of the engine runs, they are those of .local/env. Raises StackError if `environ`
    has others.
    """
    chosen = {variable: environ[variable] for variable in ADDRESSES if variable in environ}
    if not any(kind.attach(LOCAL / kind.name).pid for kind in ENGINE):
        return chosen
    used = {variable: written[variable] for variable in ADDRESSES if variable in written}
    if others := [name for name in used if chosen.get(name, used[name]) != used[name]]:
        raise StackError(
            f"the running engine uses other servers than those of {', '.join(others)}; run "
            f"`make down` first, or `unset {' '.join(others)}`"
        )
    return chosen | used


def _check(addresses: Addresses, chosen: Mapping[str, str]) -> None:
    """Raise StackError with the failures of `flashsalectl doctor` if any address is `chosen`."""
    if not chosen:
        return
    done = subprocess.run(
        [Path(sys.executable).with_name("flashsalectl"), "doctor", "-o", "json"],
        env={**os.environ, **addresses.environment()},
        capture_output=True,
        text=True,
        check=False,
    )
    failures = [
        f"{each['server']}: {each['text']}"
        for each in json.loads(done.stdout or "[]")
        if each["verdict"] == "failure" and each["server"] != "Kubernetes"
    ]
    if not done.stdout:  # a wrong setting
        failures = done.stderr.splitlines()
    if failures:
        if named := [variable for variable in chosen if variable in os.environ]:
            failures.append(f"`unset {' '.join(named)}` lets `make up` start its own servers")
        raise StackError("\n".join(failures))


def up(port: int, redis: str = "") -> None:
    """Start the servers, the API and a consumer in the background, and declare two sales.

    With `redis` = "cluster", Redis is a cluster. It stays one until `clean`.
    """
    if redis == CLUSTER and (LOCAL / RedisServer.name).exists():
        raise StackError("the sales are in one Redis server; `make clean` removes them")
    clustered = redis == CLUSTER or (LOCAL / RedisCluster.name).exists()
    if strays := [pid for pid in _marked() if pid not in _recorded()]:
        raise StackError(
            f"processes of an earlier `make up` still run, and .local no longer names them: "
            f"{', '.join(map(str, strays))}; `make down` stops them"
        )
    LOCAL.mkdir(exist_ok=True)
    written = read_variables(_ENV)
    chosen = _chosen(os.environ, written)
    os.environ[_MARK] = str(ROOT)
    with ExitStack() as undo:

        def started(server: Server) -> None:
            undo.callback(server.stop)

        addresses = start_stack(LOCAL, chosen, started, clustered=clustered, detached=True)
        _check(addresses, chosen)
        # The API may be running already, with the token that the file has.
        token = written.get("FLASHSALE_ORDER_TOKENS") or secrets.token_urlsafe(32)
        api = ApiServer(
            LOCAL / "api",
            addresses,
            port,
            metrics_port=port + METRICS_OFFSET,
            orders_port=port + ORDERS_OFFSET,
            order_tokens=token,
            detached=True,
        )
        running = ApiServer.attach(api.data)
        if running.pid is not None and running.port != port:
            raise StackError(
                f"the API already runs on port {running.port}; run `make down` before you choose "
                "another port"
            )
        _start(ConsumerServer(LOCAL / "consumer", addresses, detached=True), started)
        _start(api, started)
        undo.callback(write_variables, _ENV, written)
        variables = {
            **addresses.environment(),
            "FLASHSALE_API_URL": f"http://localhost:{port}",
            "FLASHSALE_ORDERS_URL": f"http://localhost:{port + ORDERS_OFFSET}",
            "FLASHSALE_ORDER_TOKENS": token,
        }
        write_variables(_ENV, variables)
        declared = asyncio.run(_declared(addresses))
        for manifest in FIRST_SALES:
            # Later, only its owner changes a sale: with flashsalectl, or with kubectl.
            if f"default/{manifest.stem}" not in declared:
                flashsalectl(addresses, "apply", "-f", str(manifest))
        # A new Redis process trusts no sale of the former one.
        flashsalectl(addresses, "rebuild", "--all")
        undo.pop_all()
    print(f"""
Watch the sales, and reserve, on http://localhost:{port}/ in a browser.

The API listens on http://localhost:{port}, and for the shop's order service on
http://localhost:{port + ORDERS_OFFSET}. Its metrics are on {api.metrics_url}. Try:

  curl -X POST localhost:{port}/reserve -H "Content-Type: application/json" \\
    -d '{{"userId":"user1","itemId":"iphone_15","quantity":1}}'
  .venv/bin/flashsalectl audit

The logs are in .local/*/*.log. `make down` stops everything, and `make up` continues with the same
sales. `make clean` also removes them.""")


def write_variables(file: Path, variables: Mapping[str, str]) -> None:
    """Write variables for a shell. An address can have an ampersand, and a password any sign."""
    file.touch()
    file.chmod(0o600)
    file.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items()))


def read_variables(file: Path) -> dict[str, str]:
    """Return the variables that the last `make up` wrote."""
    return local_env.variables(
        file.read_text(errors="replace").splitlines() if file.exists() else []
    )


def control_plane() -> None:
    """Start a Kubernetes API with the CRD and the operator, next to a running engine."""
    addresses, _ = running_engine()
    with ExitStack() as undo:

        def started(server: Server) -> None:
            undo.callback(server.stop)

        folder = binaries().folder
        plane = ControlPlane(LOCAL / ControlPlane.name, detached=True)
        _start(plane, started)
        plane.kubectl("apply", "-f", str(CRD), check=True)
        plane.kubectl("wait", "--for=condition=Established", f"crd/{RESOURCE}", check=True)
        environment = {**addresses.environment(), "KUBECONFIG": str(plane.kubeconfig)}
        _start(OperatorServer(LOCAL / OperatorServer.name, environment, detached=True), started)
        undo.pop_all()
    print(f"""
The operator watches FlashSales. Try, in this folder:

  export KUBECONFIG=$PWD/{plane.kubeconfig.relative_to(ROOT)} PATH={folder}:$PATH
  kubectl apply -f k8s/samples/iphone-15.yaml
  kubectl get flashsales

`make down` stops it too.""")


def down(*, keep: bool = True) -> None:
    """Stop everything that `up` and `control_plane` started, by the recorded process ids."""
    stopped = False
    # The engine stops before its servers, so that it can still publish and record the rest.
    for server in _attached():
        if server.pid is not None:
            print(f"  {server.name:9} stopping process {server.pid}", flush=True)
            server.stop()
            stopped = True
    for pid in _marked():
        print(f"  process {pid}, which .local does not name, is stopped", flush=True)
        _end(pid)
        stopped = True
    left = "The data stays in .local." if keep and LOCAL.exists() else ""
    print(f"Stopped. {left}".rstrip() if stopped else "Nothing is running.")


def clean() -> None:
    """Stop everything and remove the data."""
    down(keep=False)
    if LOCAL.exists():
        size = sum(path.lstat().st_size for path in LOCAL.rglob("*") if path.is_file())
        shutil.rmtree(LOCAL)
        print(f"Removed .local: {size / 1e6:.0f} MB of data and logs.")


def _recorded() -> set[int | None]:
    """Return the process ids in .local."""
    return {server.pid for server in _attached()}


def _attached() -> list[Server]:
    """Return the servers that have a folder in .local, in the order of their stop."""
    nodes = sorted((LOCAL / RedisCluster.name).glob("*"))
    return [
        *(kind.attach(LOCAL / kind.name) for kind in SERVERS if (LOCAL / kind.name).exists()),
        *map(RedisServer.attach, nodes),
    ]


def _marked() -> list[int]:
    """Return the running processes that `up` and `control_plane` of this checkout have started.

    Each of them leads a session. Their children end with them. Without /proc nothing is found.
    """
    mark = f"{_MARK}={ROOT}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to another user
            pid = int(process.name)
            marks = (process / "environ").read_bytes().split(b"\0")
            if mark in marks and os.getsid(pid) == pid and lifeline.identity(pid):
                found.append(pid)
    return sorted(found)


def _end(pid: int) -> None:
    """Stop a process gracefully, and kill it with its children after a while."""
    identity = lifeline.identity(pid)
    lifeline.send([pid], signal.SIGTERM)
    deadline = time.monotonic() + END_SECONDS
    while lifeline.identity(pid) == identity and time.monotonic() < deadline:
        time.sleep(0.05)
    if lifeline.identity(pid) == identity:
        lifeline.destroy(pid)


def _start(server: Server, started: Callable[[Server], None]) -> None:
    if server.data.exists() and type(server).attach(server.data).pid is not None:
        print(f"  {server.name:9} already running on port {server.port}", flush=True)
        return
    begun = time.monotonic()
    started(server)  # before the start, because Ctrl-C can come right after it
    print(f"  {server.name:9} starting on port {server.port} …", end="", flush=True)
    try:
        server.start()
    finally:
        print(f" {time.monotonic() - begun:.1f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    starting = commands.add_parser(
        "up",
        help="start Redis, Kafka, PostgreSQL, the API and a consumer in the background, and "
        "declare two sales",
    )
    starting.add_argument(
        "--port", type=_port, default=API_PORT, help="of the API; its metrics are 1010 above it"
    )
    starting.add_argument(
        "--redis",
        choices=["", CLUSTER],
        default="",
        help="cluster: three primaries with a replica each, instead of one server",
    )
    commands.add_parser("down", help="stop everything; the data stays in .local")
    commands.add_parser("clean", help="stop everything and remove .local")
    commands.add_parser(
        "control-plane", help="start a Kubernetes API with CRD and operator, after `up`"
    )
    chosen = parser.parse_args()
    actions = {"down": down, "clean": clean, "control-plane": control_plane}
    try:
        if chosen.command == "up":
            up(chosen.port, chosen.redis)
        else:
            actions[chosen.command]()
    except StackError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except OSError as error:
        if not Path(str(error.filename)).is_relative_to(LOCAL):
            raise
        print(
            f"\n{error.filename}: {error.strerror}; make {LOCAL} a folder that you can write, or "
            "remove it",
            file=sys.stderr,
        )
        return 1
    return 0


def _port(text: str) -> int:
    highest = 65535 - METRICS_OFFSET
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= highest:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {highest}, not {text}")
    return int(text)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(ending_quietly(main))
