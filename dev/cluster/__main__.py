"""`python -m dev.cluster`: the Kubernetes programs that no wheel brings."""

import argparse
import sys

from dev.cluster.binaries import binaries, kubernetes_version
from dev.stack.errors import StackError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser(
        "build", help="build etcd, kube-apiserver and kubectl into the cache, unless that was done"
    )
    parser.parse_args()
    try:
        folder = binaries().folder
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(f"Kubernetes {kubernetes_version()}: {folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
