"""`make check-locks`: check the pinned packages of the images against the index and advisories.

The package index must still serve every pinned file with its hash, and none may be yanked. No
advisory that pip-audit reads may apply to one of them. If the advisory service cannot be reached or
does not know a package, the package is reported as not checked. With `--require-advisories` that is
a failure.
"""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from dev.paths import ROOT
from dev.progress import ending_quietly

LOCKS: Final = (
    ROOT / "services" / "api" / "requirements.txt",
    ROOT / "services" / "consumer" / "requirements.txt",
    ROOT / "operator" / "requirements.txt",
)
_UNREACHED: Final = re.compile(
    r"Could not connect to|^requests\.exceptions\.(Connect|Proxy|SSL|Read|ChunkedEncoding)",
    re.MULTILINE,
)
"""pip-audit's messages if it cannot reach the service. Some are the last line of a traceback."""


@dataclass(frozen=True, slots=True)
class Findings:
    """The result of one check: lines about `wrong` packages, and the `unchecked` packages."""

    packages: int
    wrong: tuple[str, ...]
    unchecked: tuple[str, ...]
    reason: str = ""
    """Why the first unchecked package was not checked."""


def main() -> int:
    """Return 1 if something is wrong, or not checked although it had to be."""
    parser = argparse.ArgumentParser(prog="python -m dev.check_locks", description=__doc__)
    parser.add_argument(
        "--require-advisories",
        action="store_true",
        help="fail if a package could not be checked against the advisories",
    )
    options = parser.parse_args()
    failed = False
    for lock in LOCKS:
        print(f"{lock.relative_to(ROOT)} …", flush=True)
        for check, passed in (
            (check_index, "served with the pinned hashes, and not yanked"),
            (check_advisories, "without a known vulnerability"),
        ):
            found = check(lock)
            for line in found.wrong:
                print(f"  WRONG: {line}")
            if found.unchecked:
                print(
                    f"  NOT CHECKED: {len(found.unchecked)} of {found.packages} packages: "
                    f"{found.reason}"
                )
            if not found.wrong and not found.unchecked:
                print(f"  {found.packages} packages: {passed}")
            failed |= bool(found.wrong) or (options.require_advisories and bool(found.unchecked))
    return 1 if failed else 0


def check_index(lock: Path) -> Findings:
    """Check with pip that the index serves every pinned file, and that none is yanked."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = _run(
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--dry-run",
            "--ignore-installed",
            "--no-deps",
            "--require-hashes",
            f"--report={report}",
            f"--requirement={lock}",
        )
        if done.returncode != 0:
            return Findings(0, (done.stderr.strip()[-2000:],), ())
        return of_index(json.loads(report.read_text()))


def of_index(report: dict[str, Any]) -> Findings:
    """Read pip's report of an installation."""
    packages = report["install"]
    yanked = [package["metadata"] for package in packages if package.get("is_yanked")]
    wrong = tuple(f"{each['name']} {each['version']} was yanked by its authors" for each in yanked)
    return Findings(len(packages), wrong, ())


def check_advisories(lock: Path) -> Findings:
    """Check with pip-audit that no advisory applies to a pinned package."""
    done = _run(
        "pip_audit",
        f"--requirement={lock}",
        "--disable-pip",
        "--require-hashes",
        "--format=json",
        "--progress-spinner=off",
        "--timeout=10",
    )
    try:
        return of_advisories(json.loads(done.stdout))
    except json.JSONDecodeError:
        return of_failure(done.stderr, lock)


def of_failure(stderr: str, lock: Path) -> Findings:
    """Read the errors of a pip-audit that made no report."""
    lines = stderr.strip().splitlines() or ["no report"]
    if not (unreached := _UNREACHED.search(stderr)):
        # One that spans lines points at a column in the end.
        last = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1])
        return Findings(0, (f"pip-audit: {last}",), ())
    told = next(line for line in lines if unreached[0] in line)
    pinned = [line for line in lock.read_text().splitlines() if "==" in line]
    reason = f"the advisory service cannot be reached: {told[:500]}"
    return Findings(len(pinned), (), tuple(pinned), reason)


def of_advisories(report: dict[str, Any]) -> Findings:
    """Read pip-audit's report."""
    wrong, unchecked, reason = [], [], ""
    for package in report["dependencies"]:
        if "skip_reason" in package:
            unchecked.append(package["name"])
            reason = reason or package["skip_reason"]
        for known in package.get("vulns", ()):
            fixed = ", ".join(known["fix_versions"]) or "no version yet"
            wrong.append(f"{package['name']} {package['version']}: {known['id']}, fixed in {fixed}")
    return Findings(len(report["dependencies"]), tuple(wrong), tuple(unchecked), reason)


def _run(module: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(ending_quietly(main))
