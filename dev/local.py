"""`python -m dev.local`: the whole engine on this machine, without Docker."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from dev.cluster.binaries import binaries
from dev.cluster.control_plane import ControlPlane
from dev.services import Addresses, ApiServer, ConsumerServer, OperatorServer
from dev.stack.servers import KafkaServer, PostgresServer, RedisServer, Server, StackError

ROOT: Final = Path(__file__).parent.parent
LOCAL: Final = ROOT / ".local"
SAMPLE: Final = ROOT / "k8s" / "samples" / "iphone-15.yaml"
CRD: Final = ROOT / "charts" / "flashsale" / "files" / "crd.yaml"
RESOURCE: Final = "flashsales.flashsale.dev"
API_PORT: Final = 8080


def start_stack(
    data: Path,
    environ: Mapping[str, str],
    started: Callable[[Server], None],
    *,
    detached: bool = False,
) -> Addresses:
    """Starts Redis, Kafka and PostgreSQL below `data`, but for those that `environ` names.

    `started` is given each server that this call started; what ran already is left alone.
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
        # `make up` writes its own addresses to .local/env, which may be set when it runs again.
        if named is None or (server.data.exists() and named == address()):
            _start(server, started)
            named = address()
        else:
            print(f"  {server.name:9} {variable} is set: yours is taken", flush=True)
        addresses.append(named)
    return Addresses(*addresses)


def apply_sample(addresses: Addresses) -> None:
    """Runs `flashsalectl apply` on the sample; raises StackError if it fails."""
    done = subprocess.run(
        [Path(sys.executable).with_name("flashsalectl"), "apply", "-f", SAMPLE],
        env={**os.environ, **addresses.environment()},
        check=False,
    )
    if done.returncode != 0:
        raise StackError(
            f"flashsalectl apply failed (exit code {done.returncode}): it says above what to do"
        )


def up() -> None:
    """Stack, API on port 8080 and consumer in the background, and the sample applied."""
    LOCAL.mkdir(exist_ok=True)
    with ExitStack() as undo:

        def started(server: Server) -> None:
            undo.callback(server.stop)

        addresses = start_stack(LOCAL, os.environ, started, detached=True)
        api = ApiServer(LOCAL / "api", addresses, API_PORT, detached=True)
        _start(ConsumerServer(LOCAL / "consumer", addresses, detached=True), started)
        _start(api, started)
        variables = {**addresses.environment(), "FLASHSALE_API_URL": f"http://localhost:{API_PORT}"}
        env = LOCAL / "env"
        env.touch(mode=0o600)
        env.write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        apply_sample(addresses)
        undo.pop_all()
    print(f"""
The API answers on http://localhost:{API_PORT} (its metrics on {api.metrics_url}). Try:

  curl -X POST localhost:{API_PORT}/reserve -H "Content-Type: application/json" \\
    -d '{{"userId":"user1","itemId":"iphone_15","quantity":1}}'
  set -a; . .local/env; set +a; .venv/bin/flashsalectl audit

Logs are in .local/*/*.log. `make down` ends it; the data stays until you remove .local.""")


def control_plane() -> None:
    """A Kubernetes API with the CRD and the operator, beside what `up` started."""
    if ApiServer.attach(LOCAL / ApiServer.name).pid is None:
        raise StackError("the engine does not run: `make up` starts it")
    written = dict(line.split("=", 1) for line in (LOCAL / "env").read_text().splitlines())
    with ExitStack() as undo:

        def started(server: Server) -> None:
            undo.callback(server.stop)

        folder = binaries().folder
        plane = ControlPlane(LOCAL / ControlPlane.name, detached=True)
        _start(plane, started)
        plane.kubectl("apply", "-f", str(CRD), check=True)
        plane.kubectl("wait", "--for=condition=Established", f"crd/{RESOURCE}", check=True)
        environment = {**written, "KUBECONFIG": str(plane.kubeconfig)}
        _start(OperatorServer(LOCAL / OperatorServer.name, environment, detached=True), started)
        undo.pop_all()
    print(f"""
FlashSales can be declared. Try, in this folder:

  export KUBECONFIG=$PWD/{plane.kubeconfig.relative_to(ROOT)} PATH=$PATH:{folder}
  kubectl apply -f k8s/samples/iphone-15.yaml
  kubectl get flashsales

`make down` ends it too.""")


def down() -> None:
    """Ends what `up` started, by the ids that were recorded."""
    stopped = False
    # The engine before its servers: so it ends with nothing left to publish or record.
    kinds: tuple[type[Server], ...] = (
        *(OperatorServer, ControlPlane, ApiServer, ConsumerServer),
        *(KafkaServer, PostgresServer, RedisServer),
    )
    for kind in kinds:
        if not (LOCAL / kind.name).exists():
            continue
        server = kind.attach(LOCAL / kind.name)
        if server.pid is not None:
            print(f"  {server.name:9} stopping process {server.pid}", flush=True)
            server.stop()
            stopped = True
    print("Stopped; the data stays in .local." if stopped else "Nothing runs.")


def _start(server: Server, started: Callable[[Server], None]) -> None:
    if server.data.exists() and type(server).attach(server.data).pid is not None:
        print(f"  {server.name:9} runs already on port {server.port}", flush=True)
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
    commands.add_parser("up", help="stack, API on port 8080 and consumer, in the background")
    commands.add_parser("down", help="ends what up started; keeps the data in .local")
    commands.add_parser(
        "control-plane", help="a Kubernetes API with CRD and operator, beside what up started"
    )
    commands.add_parser("demo", help="sells 100 phones to a crowd on fresh servers, and checks")
    command = parser.parse_args().command
    try:
        match command:
            case "up":
                up()
            case "down":
                down()
            case "control-plane":
                control_plane()
            case _:
                from dev.demo import demo  # noqa: PLC0415 - the demo builds on this module

                return demo()
    except StackError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
