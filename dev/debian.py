"""Installs programs from Debian's packages."""

import os
import shutil
import subprocess
from collections.abc import Mapping

from dev.progress import say
from dev.stack.errors import StackError


def require(programs: Mapping[str, str], purpose: str) -> None:
    """Install the packages of missing programs. Needs root on Debian or Ubuntu.

    `programs` maps each program to its package. Raises StackError with the list of packages if they
    cannot be installed.
    """
    missing = sorted({package for name, package in programs.items() if shutil.which(name) is None})
    if not missing:
        return
    command = ("apt-get", "install", "--yes", "--no-install-recommends", *missing)
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise StackError(
            f"{purpose} needs {', '.join(missing)}; on Debian or Ubuntu, run as root: "
            f"{' '.join(command)}"
        )
    say(f"installing Debian's packages {', '.join(missing)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for each in (("apt-get", "update"), command):
        done = subprocess.run(each, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StackError(f"`{' '.join(each)}` failed: {done.stderr.strip()}")
