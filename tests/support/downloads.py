"""Programs of Debian's packages and of wheels, unpacked into the cache. Nothing is installed."""

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from dev.stack.errors import StackError
from dev.stack.locks import exclusive
from dev.stack.packages import cache_folder


def debian(program: str, *packages: str) -> Path:
    """Return the folder with these packages. Raises StackError where they cannot be had."""
    folder = cache_folder() / program
    with exclusive(folder):
        if not folder.exists():
            if shutil.which("apt-get") is None:
                raise StackError(f"{program} comes from Debian's packages")
            part = folder.with_name(f"{program}.part")
            with TemporaryDirectory(prefix=f"flashsale-{program}-") as scratch:
                _run("apt-get", "download", *packages, folder=scratch)
                for package in Path(scratch).glob("*.deb"):
                    _run("dpkg-deb", "--extract", str(package), str(part), folder=scratch)
            part.rename(folder)
    return folder


def wheel(requirement: str) -> Path:
    """Return the folder with the wheel of a line of a requirements file.

    Raises StackError where it cannot be had.
    """
    name = requirement.partition(" ")[0]
    folder = cache_folder() / name
    with exclusive(folder):
        if not folder.exists():
            part = folder.with_name(f"{name}.part")
            shutil.rmtree(part, ignore_errors=True)
            with TemporaryDirectory(prefix="flashsale-wheel-") as scratch:
                (Path(scratch) / "requirements.txt").write_text(requirement)
                pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
                options = ("--no-deps", "--require-hashes", "--only-binary=:all:")
                target = ("--target", str(part), "--requirement", "requirements.txt")
                _run(*pip, "install", *options, *target, folder=scratch)
            part.rename(folder)
    return folder


def _run(*command: str, folder: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise StackError(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
