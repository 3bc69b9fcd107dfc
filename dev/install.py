"""`python dev/install.py`: install the locked packages into .venv, and show the progress.

It runs before anything is installed, so it imports only the standard library. Python 3.6 can run
it too, and hears which Python is needed.
"""

import platform
import re
import subprocess
import sys
import time
import venv
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".venv"
LOCK = ROOT / "dev" / "requirements.txt"
LOG = FOLDER / "install.log"
OLDEST, NEWEST = (3, 11), (3, 14)
"""`requires-python` of pyproject.toml. Newer ones lack wheels, such as aiokafka's."""
MEGABYTES = (245, 800)
"""To download, and on disk afterwards."""


def install() -> int:
    """Install the packages of dev/requirements.txt and this project. Returns an exit code."""
    lacking = refusal(sys.version_info[:2], has_pip=find_spec("ensurepip") is not None)
    if lacking:
        return _failed(lacking)
    print(f"Installing into .venv: {MEGABYTES[0]} MB to download, {MEGABYTES[1]} MB on disk.")
    sys.stdout.flush()
    # Two Pythons in one folder would install with one and run with the other.
    venv.create(FOLDER, clear=not made_by(sys.executable, FOLDER), with_pip=True, symlinks=True)
    steps = (
        ["--require-hashes", "--requirement", str(LOCK)],
        ["--no-deps", "--no-build-isolation", "--editable", str(ROOT)],
    )
    for step in steps:
        code = _pip(*step)
        if code:
            return code
    return 0


def refusal(version: tuple, *, has_pip: bool) -> str:  # type: ignore[type-arg] # Python 3.6 runs it
    """Return why a Python of this version cannot be used, or "" if it can."""
    if not OLDEST <= version <= NEWEST:
        found, oldest, newest = ("{}.{}".format(*pair) for pair in (version, OLDEST, NEWEST))
        return (
            f"Python {oldest} to {newest} is needed, this is {found}. "
            f"Name another one: make setup PYTHON=python{newest}"
        )
    if not has_pip:
        return (
            "This Python lacks ensurepip, which installs pip into .venv. "
            "On Debian and Ubuntu: apt-get install python{}.{}-venv".format(*version)
        )
    return ""


def made_by(python: str, folder: Path) -> bool:
    """Return whether this Python, and not another one, made the environment in this folder."""
    packages = folder / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
    return packages.is_dir() and (folder / "bin" / "python").resolve() == Path(python).resolve()


def _pip(*arguments: str) -> int:
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
    return _failed("\n".join([*reasons, f"{advice(output)}. The whole log is {LOG}."]))


def advice(output: str) -> str:
    """Return the cause of a failure of pip, as its output shows it."""
    if "connection broken by" in output or "Could not fetch URL" in output:
        return "The package index cannot be reached: this first run needs the network"
    # pip says the same of a package without files for this machine, and of one that is unknown.
    if "from versions: none" in output:
        python = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
        return f"The package index has no file of this package for {python}"
    return "The packages cannot be installed"


def _failed(why: str) -> int:
    print(why, file=sys.stderr)
    return 1


if __name__ == "__main__":
    try:
        sys.exit(install())
    except KeyboardInterrupt:
        sys.exit(130)
