"""`python -m dev.cluster`: a real one-node Kubernetes without Docker, and the programs for it."""

import argparse
import sys

from dev.cluster.binaries import TOOLSETS
from dev.cluster.images import load_all
from dev.cluster.node import OF_TESTS, Cluster
from dev.cluster.toolset import built
from dev.stack.errors import StackError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build the programs, unless that was done")
    # Not `choices`, which would have argparse refuse none at all.
    build.add_argument("what", nargs="*", help=f"of {', '.join(TOOLSETS)}; kubernetes if none")
    commands.add_parser("up", help="start the cluster (Linux, root; Debian's packages)")
    commands.add_parser("down", help="end it, and that of `make e2e`; only logs stay")
    load = commands.add_parser("load", help="give its node images")
    load.add_argument(
        "reference",
        nargs="*",
        help="as `python -m dev.images build` printed it; if none, all are built: the deployables, "
        "under the tag that the chart takes, and the servers",
    )
    options = parser.parse_args()
    cluster = Cluster()
    try:
        match options.command:
            case "build":
                _build(parser, options.what)
            case "up":
                cluster.up()
                sys.stdout.write(f"export PATH={cluster.commands}:$PATH\n")
            case "down":
                cluster.down()
                Cluster(OF_TESTS).down()  # of tests that were killed
            case "load":
                if options.reference:
                    cluster.load({each: each for each in options.reference})
                else:
                    load_all(cluster)
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _build(parser: argparse.ArgumentParser, names: list[str]) -> None:
    if unknown := [name for name in names if name not in TOOLSETS]:
        parser.error(f"{unknown[0]} is none of {', '.join(TOOLSETS)}")
    for name in names or ["kubernetes"]:
        tools = TOOLSETS[name]
        sys.stdout.write(f"{tools.named}: {built(tools)}\n")


if __name__ == "__main__":
    sys.exit(main())
