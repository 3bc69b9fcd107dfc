"""`python dev/install.py`: install the locked packages into .venv, and show the progress.

It runs before anything is installed, so it imports only the standard library.
"""

import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv"
LOCK = ROOT / "dev" / "requirements.txt"
LOG = FOLDER / "install.log"
MEGABYTES = (245, 800)
"""To download, and on disk afterwards."""


def install() -> int:
    """Install the packages of dev/requirements.txt and this project. Returns an exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - any Python can run this file
        found = ".".join(map(str, sys.version_info[:2]))
        return _failed(f"Python 3.11 or newer is needed, this is {found}: make PYTHON=python3.12 …")
    print(f"Installing into .venv: {MEGABYTES[0]} MB to download, {MEGABYTES[1]} MB on disk.")
    sys.stdout.flush()
    venv.create(FOLDER, with_pip=True, symlinks=True)
    steps = (
        ["--require-hashes", "--requirement", str(LOCK)],
        ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)],
    )
    for step in steps:
        if code := _pip(step):
            return code
    return 0


def _pip(arguments: list[str]) -> int:
    total = len(re.findall(r"^[A-Za-z0-9].*==", LOCK.read_text(), re.MULTILINE))
    command = [str(FOLDER / "bin" / "pip"), "install", "--no-input", "--disable-pip-version-check"]
    with LOG.open("ab") as log:
        start = log.tell()
        pip = subprocess.Popen([*command, *arguments], stdout=log, stderr=log)
    try:
        while pip.poll() is None:
            time.sleep(0.5)
            seen = len(re.findall(r"^Collecting", LOG.read_text(errors="replace"), re.MULTILINE))
            if sys.stdout.isatty():
                print(f"\r  {seen} of about {total} packages", end="", flush=True)
    finally:
        if pip.poll() is None:
            pip.terminate()
            pip.wait()
    if sys.stdout.isatty():
        print("\r\x1b[K", end="")
    if pip.returncode == 0:
        return 0
    with LOG.open("rb") as log:
        log.seek(start)
        output = log.read().decode(errors="replace")
    reasons = [line for line in output.splitlines() if "error" in line.lower()][:5]
    offline = "NewConnectionError" in output or "from versions: none" in output
    advice = (
        "The package index cannot be reached: this first run needs the network"
        if offline
        else "The packages cannot be installed"
    )
    return _failed("\n".join([*reasons, f"{advice}. The whole log is {LOG}."]))


def _failed(why: str) -> int:
    print(why, file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(install())
    except KeyboardInterrupt:
        sys.exit(130)
