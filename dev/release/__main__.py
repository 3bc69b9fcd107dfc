"""`python -m dev.release`: check a version, print its notes, make its chart, lint the workflows."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from dev.cluster.binaries import release
from dev.paths import LOCAL, ROOT
from dev.progress import ending_quietly
from dev.release.changelog import notes
from dev.release.chart import Release, package, push
from dev.release.checks import disagreements, read_digests
from dev.release.images import pushed
from dev.stack.errors import StackError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dev.release", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check that everything names this version")
    check.add_argument("version")
    check.add_argument("--chart", type=Path, help="also check this package of the chart")
    check.add_argument("--digests", type=Path, help="digests of the images, `NAME DIGEST` per line")
    printing = commands.add_parser("notes", help="print the changelog's section of a version")
    printing.add_argument("version")
    asking = commands.add_parser("digests", help="print the digests of pushed images")
    asking.add_argument("version")
    asking.add_argument("--images", required=True, help="registry and owner of the images")
    packaging = commands.add_parser("chart", help="package the chart of a version")
    packaging.add_argument("version")
    packaging.add_argument("--images", required=True, help="registry and owner of the images")
    packaging.add_argument("--digests", type=Path, required=True)
    packaging.add_argument("--source", default="", help="address of the repository's page")
    packaging.add_argument("--folder", type=Path, default=LOCAL / "release")
    pushing = commands.add_parser("push", help="push a package, and print its name with digest")
    pushing.add_argument("package", type=Path)
    pushing.add_argument("--images", required=True, help="registry and owner of the chart")
    pushing.add_argument("--plain-http", action="store_true", help="for a registry on loopback")
    commands.add_parser("lint", help="run actionlint on the workflows")
    options = parser.parse_args()
    try:
        match options.command:
            case "check":
                found = disagreements(ROOT, options.version, options.chart, options.digests)
                for each in found:
                    sys.stderr.write(f"{each}\n")
                if not found:
                    sys.stdout.write(f"Everything names version {options.version}.\n")
                return 1 if found else 0
            case "notes":
                sys.stdout.write(notes(ROOT, options.version) + "\n")
            case "digests":
                for name, digest in pushed(options.images, options.version):
                    sys.stdout.write(f"{name} {digest}\n")
            case "chart":
                pinned = Release(
                    options.version,
                    options.images,
                    read_digests(options.digests),
                    options.source,
                )
                path = package(ROOT, pinned, options.folder)
                sys.stdout.write(f"{os.path.relpath(path)}\n")
            case "push":
                sys.stdout.write(
                    push(options.package, options.images, plain_http=options.plain_http) + "\n"
                )
            case "lint":
                return subprocess.run([release() / "actionlint"], cwd=ROOT, check=False).returncode
    except StackError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
