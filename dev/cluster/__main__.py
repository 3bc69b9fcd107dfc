"""`python -m dev.cluster`: the Kubernetes programs that no wheel brings."""

import argparse
import sys

from dev.cluster.binaries import binaries, helm, helm_version, kubernetes_version
from dev.stack.errors import StackError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build them into the cache, unless that was done")
    build.add_argument(
        "what",
        nargs="*",
        choices=["kubernetes", "helm"],
        default="kubernetes",
        help="kubernetes (etcd, kube-apiserver and kubectl; the default) or helm",
    )
    options = parser.parse_args()
    wanted = [options.what] if isinstance(options.what, str) else options.what
    try:
        for what in wanted:
            if what == "helm":
                sys.stdout.write(f"Helm {helm_version()}: {helm().parent}\n")
            else:
                sys.stdout.write(f"Kubernetes {kubernetes_version()}: {binaries().folder}\n")
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
