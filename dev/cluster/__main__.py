"""`python -m dev.cluster`: build the programs of Kubernetes, and run one node without Docker."""

import argparse
import sys

from dev.cluster.binaries import TOOLSETS
from dev.cluster.images import load_all
from dev.cluster.node import OF_TESTS, Cluster
from dev.cluster.toolset import built
from dev.progress import ending_quietly
from dev.stack.errors import StackError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build = commands.add_parser("build", help="build the programs, unless that is done")
    # Not `choices`, because argparse would then require at least one.
    build.add_argument(
        "toolset",
        nargs="*",
        help=f"one or more of {', '.join(TOOLSETS)} (default: kubernetes)",
    )
    commands.add_parser("up", help="start the cluster (needs Linux, root and Debian's packages)")
    commands.add_parser("down", help="stop it and the cluster of `make e2e`, and remove both")
    load = commands.add_parser("load", help="load images into the cluster")
    load.add_argument(
        "reference",
        nargs="*",
        help="an image printed by `python -m dev.images build`; by default all images are built: "
        "the deployables with the tag that the chart uses, and the servers",
    )
    options = parser.parse_args()
    cluster = Cluster()
    try:
        match options.command:
            case "build":
                _build(parser, options.toolset)
            case "up":
                cluster.up()
                sys.stdout.write(f"export PATH={cluster.commands}:$PATH\n")
            case "down":
                cluster.down()
                Cluster(OF_TESTS).down()  # left by tests that were killed
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
        parser.error(f"{unknown[0]} is not one of {', '.join(TOOLSETS)}")
    for name in names or ["kubernetes"]:
        tools = TOOLSETS[name]
        sys.stdout.write(f"{tools.named}: {built(tools)}\n")


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
