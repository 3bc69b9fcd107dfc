"""`python -m dev.images`: build the images without Docker and without a registry."""

import argparse
import sys
from pathlib import Path

from dev.images.archive import save
from dev.images.building import DEPLOYABLES, build
from dev.images.servers import SERVERS, build_servers
from dev.progress import ending_quietly
from dev.stack.errors import StackError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.images", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    building = commands.add_parser("build", help="build changed images, and print all")
    # Not `choices`, because argparse would then require at least one.
    building.add_argument(
        "name",
        nargs="*",
        help=f"one or more of {', '.join((*DEPLOYABLES, *SERVERS))} "
        f"(default: {', '.join(DEPLOYABLES)})",
    )
    saving = commands.add_parser(
        "save", help="write an image as an archive for `ctr images import`"
    )
    saving.add_argument("reference", help="an image printed by `build`")
    saving.add_argument("archive", type=Path)
    options = parser.parse_args()
    try:
        if options.command == "save":
            save({options.reference: options.reference}, options.archive)
            return 0
        known = (*DEPLOYABLES, *SERVERS)
        if unknown := [name for name in options.name if name not in known]:
            parser.error(f"{unknown[0]} is not one of {', '.join(known)}")
        for reference in build_servers([name for name in options.name if name in SERVERS]):
            sys.stdout.write(f"{reference}\n")
        own = [name for name in options.name if name in DEPLOYABLES]
        for image in build(own if options.name else list(DEPLOYABLES)):
            sys.stdout.write(
                f"{image.reference}  {image.size / 1e6:.0f} MB, "
                f"{image.added / 1e6:.1f} MB on top of its base\n"
            )
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
