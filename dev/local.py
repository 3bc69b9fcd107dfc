"""`python -m dev.local`: run the whole engine on this machine, without Docker."""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from dev.cluster.binaries import binaries
from dev.cluster.control_plane import ControlPlane
from dev.paths import LOCAL, ROOT
from dev.services import Addresses, ApiServer, ConsumerServer, OperatorServer, flashsalectl
from dev.stack.errors import StackError
from dev.stack.process import Server
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer

SAMPLE: Final = ROOT / "k8s" / "samples" / "iphone-15.yaml"
CRD: Final = ROOT / "charts" / "flashsale" / "files" / "crd.yaml"
RESOURCE: Final = "flashsales.flashsale.dev"
API_PORT: Final = 8080
_ENV: Final = LOCAL / "env"


def start_stack(
    data: Path,
    environ: Mapping[str, str],
    started: Callable[[Server], None],
    *,
    detached: bool = False,
) -> Addresses:
    """Start Redis, Kafka and PostgreSQL in folders of `data`, and return their addresses.

    A server whose address is set in `environ` is not started. `started` is called with each server
    that this call started, but not with servers that were already running.
    """
    redis = RedisServer(data / RedisServer.name, detached=detached)
    kafka = KafkaServer(data / KafkaServer.name, detached=detached)
    postgres = PostgresServer(data / PostgresServer.name, detached=detached)
    kinds: tuple[tuple[str, Server, Callable[[], str]], ...] = (
        ("FLASHSALE_REDIS_URL", redis, lambda: redis.url),
        ("FLASHSALE_KAFKA_BOOTSTRAP", kafka, lambda: kafka.bootstrap),
        ("FLASHSALE_DATABASE_URL", postgres, lambda: postgres.url),
    )
    addresses = []
    for variable, server, address in kinds:
        named = environ.get(variable)
        # If the user has sourced .local/env, the variables name the servers of an earlier `make
        # up`. Those servers are ours to start.
        if named is None or (server.data.exists() and named == address()):
            _start(server, started)
            named = address()
        else:
            print(f"  {server.name:9} not started, because {variable} is set", flush=True)
        addresses.append(named)
    return Addresses(*addresses)


def apply_sample(addresses: Addresses) -> None:
    """Apply the sample manifest with flashsalectl. Raises StackError if that fails."""
    flashsalectl(addresses, "apply", "-f", str(SAMPLE))


def running_engine() -> Addresses:
    """Return the addresses of the servers that `up` started.

    Raises StackError if the engine is not running.
    """
    if ApiServer.attach(LOCAL / ApiServer.name).pid is None:
        raise StackError("the engine is not running; start it with `make up`")
    written = dict(line.split("=", 1) for line in _ENV.read_text().splitlines())
    return Addresses(
        written["FLASHSALE_REDIS_URL"],
        written["FLASHSALE_KAFKA_BOOTSTRAP"],
        written["FLASHSALE_DATABASE_URL"],
    )


def up() -> None:
    """Start the servers, the API and a consumer in the background, and apply the sample."""
    LOCAL.mkdir(exist_ok=True)
    with ExitStack() as undo:

        def started(server: Server) -> None:
            undo.callback(server.stop)

        addresses = start_stack(LOCAL, os.environ, started, detached=True)
        api = ApiServer(LOCAL / "api", addresses, API_PORT, detached=True)
        _start(ConsumerServer(LOCAL / "consumer", addresses, detached=True), started)
        _start(api, started)
        variables = {**addresses.environment(), "FLASHSALE_API_URL": f"http://localhost:{API_PORT}"}
        _ENV.touch(mode=0o600)
        _ENV.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        apply_sample(addresses)
        undo.pop_all()
    print(f"""
The API listens on http://localhost:{API_PORT}. Its metrics are on {api.metrics_url}. Try:

  curl -X POST localhost:{API_PORT}/reserve -H "Content-Type: application/json" \\
    -d '{{"userId":"user1","itemId":"iphone_15","quantity":1}}'
  set -a; . .local/env; set +a; .venv/bin/flashsalectl audit

The logs are in .local/*/*.log. `make down` stops everything. The data stays in .local.""")


def control_plane() -> None:
    """Start a Kubernetes API with the CRD and the operator, next to a running engine."""
    addresses = running_engine()
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

  export KUBECONFIG=$PWD/{plane.kubeconfig.relative_to(ROOT)} PATH=$PATH:{folder}
  kubectl apply -f k8s/samples/iphone-15.yaml
  kubectl get flashsales

`make down` stops it too.""")


def down() -> None:
    """Stop everything that `up` and `control_plane` started, by the recorded process ids."""
    stopped = False
    # The engine stops before its servers, so that it can still publish and record the rest.
    kinds: tuple[type[Server], ...] = (
        OperatorServer,
        ControlPlane,
        ApiServer,
        ConsumerServer,
        KafkaServer,
        PostgresServer,
        RedisServer,
    )
    for kind in kinds:
        if not (LOCAL / kind.name).exists():
            continue
        server = kind.attach(LOCAL / kind.name)
        if server.pid is not None:
            print(f"  {server.name:9} stopping process {server.pid}", flush=True)
            server.stop()
            stopped = True
    print("Stopped. The data stays in .local." if stopped else "Nothing is running.")


def _start(server: Server, started: Callable[[Server], None]) -> None:
    if server.data.exists() and type(server).attach(server.data).pid is not None:
        print(f"  {server.name:9} already running on port {server.port}", flush=True)
        return
    begun = time.monotonic()
    print(f"  {server.name:9} starting on port {server.port} …", end="", flush=True)
    try:
        server.start()
    finally:
        print(f" {time.monotonic() - begun:.1f} s", flush=True)
    started(server)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.local", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "up",
        help="start Redis, Kafka, PostgreSQL, the API on port 8080 and a consumer in the "
        "background, and apply the sample",
    )
    commands.add_parser("down", help="stop everything; the data stays in .local")
    commands.add_parser(
        "control-plane", help="start a Kubernetes API with CRD and operator, after `up`"
    )
    actions = {"up": up, "down": down, "control-plane": control_plane}
    try:
        actions[parser.parse_args().command]()
    except StackError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
