"""Programs that come as Debian's packages, where nothing else brings them."""

import os
import shutil
import subprocess
from collections.abc import Mapping

from dev.progress import say
from dev.stack.errors import StackError


def require(programs: Mapping[str, str], purpose: str) -> None:
    """Installs the packages of programs that are missing, as root on Debian or Ubuntu.

    Anywhere else raises StackError, which says what to install.
    """
    missing = sorted({package for name, package in programs.items() if shutil.which(name) is None})
    if not missing:
        return
    command = ("apt-get", "install", "--yes", "--no-install-recommends", *missing)
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise StackError(
            f"{purpose} needs {', '.join(missing)}: as root, on Debian or Ubuntu, "
            f"{' '.join(command)}"
        )
    say(f"installing {', '.join(missing)} from Debian's packages")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for each in (("apt-get", "update"), command):
        done = subprocess.run(each, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StackError(f"`{' '.join(each)}` failed: {done.stderr.strip()}")
