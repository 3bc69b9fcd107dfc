"""`make audit`: what is known of the packages that the images install.

Two questions. To the package index: is every pinned file still served with its hash, and none
yanked? To the advisories that pip-audit reads: is any of them known to be vulnerable? Where no
advisory service answers, that is said and is not taken for a clean bill; `--require-advisories`
makes it a failure.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent
LOCKS: Final = (
    ROOT / "services" / "api" / "requirements.txt",
    ROOT / "services" / "consumer" / "requirements.txt",
    ROOT / "operator" / "requirements.txt",
)


@dataclass(frozen=True, slots=True)
class Findings:
    """Lines to print: `wrong` must be mended; of `unknown` packages nobody could be asked."""

    packages: int
    wrong: tuple[str, ...]
    unknown: tuple[str, ...]


def main() -> int:
    """0: nothing wrong is known; 1: something is, or could not be asked and had to be."""
    parser = argparse.ArgumentParser(prog="python -m dev.audit", description=__doc__)
    parser.add_argument(
        "--require-advisories",
        action="store_true",
        help="fail also if a package could not be looked up in the advisories",
    )
    options = parser.parse_args()
    failed = False
    for lock in LOCKS:
        print(f"{lock.relative_to(ROOT)} …", flush=True)
        for question in (served, advisories):
            found = question(lock)
            for line in found.wrong:
                print(f"  WRONG: {line}")
            if found.unknown:
                print(
                    f"  NOT ASKED: {len(found.unknown)} of {found.packages} packages, since no "
                    "advisory service answers here; run `make audit` where one does"
                )
            if not found.wrong and not found.unknown:
                print(f"  {found.packages} packages: {question.__doc__}")
            failed |= bool(found.wrong) or (options.require_advisories and bool(found.unknown))
    return 1 if failed else 0


def served(lock: Path) -> Findings:
    """served as pinned, by hash, and none yanked"""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = _run(
            *("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--dry-run"),
            *("--ignore-installed", "--no-deps", "--require-hashes"),
            *("--report", str(report), "-r", str(lock)),
        )
        if done.returncode != 0:
            return Findings(0, (done.stderr.strip()[-2000:],), ())
        return of_index(json.loads(report.read_text()))


def of_index(report: dict[str, Any]) -> Findings:
    """What pip's report of an installation says."""
    packages = report["install"]
    yanked = [package["metadata"] for package in packages if package.get("is_yanked")]
    wrong = tuple(f"{each['name']} {each['version']} was yanked by its authors" for each in yanked)
    return Findings(len(packages), wrong, ())


def advisories(lock: Path) -> Findings:
    """without a known vulnerability"""
    done = _run(
        *("-m", "pip_audit", "--requirement", str(lock), "--disable-pip", "--require-hashes"),
        *("--format", "json", "--progress-spinner", "off", "--timeout", "10"),
    )
    try:
        return of_advisories(json.loads(done.stdout))
    except json.JSONDecodeError:
        pinned = [line for line in lock.read_text().splitlines() if "==" in line]
        return Findings(len(pinned), (), tuple(pinned))


def of_advisories(report: dict[str, Any]) -> Findings:
    """What pip-audit's report says."""
    wrong, unknown = [], []
    for package in report["dependencies"]:
        if "skip_reason" in package:
            unknown.append(package["name"])
        for known in package.get("vulns", ()):
            mended = ", ".join(known["fix_versions"]) or "no version yet"
            wrong.append(
                f"{package['name']} {package['version']}: {known['id']}, mended in {mended}"
            )
    return Findings(len(report["dependencies"]), tuple(wrong), tuple(unknown))


def _run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command: Sequence[str] = (sys.executable, *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(main())
