"""The machine: its cores, the CPU time of processes, and its description for the page."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeVar

from dev.paths import ROOT
from dev.stack import lifeline
from dev.stack.jars import kafka_version
from dev.stack.packages import cache_folder, java, java_build, postgres_programs
from dev.stack.redis import default_binary

T = TypeVar("T")

_HERTZ: Final = os.sysconf("SC_CLK_TCK")
_LOOP: Final = """
import time, timeit
print(min(timeit.repeat("sum(n * n for n in range(1000))", timer=time.process_time, number=500)))
"""
_MEASURED: Final = (
    "uvicorn",
    "httptools",
    "uvloop",
    "starlette",
    "msgspec",
    "redis",
    "hiredis",
    "aiokafka",
    "asyncpg",
    "prometheus-client",
)


class Cores:
    """The cores: `first` is for the measured process, `rest` for everything else."""

    def __init__(self) -> None:
        every = sorted(os.sched_getaffinity(0))
        self.first = {every[0]}
        self.rest = set(every[1:]) or self.first


def placed(cores: set[int], start: Callable[[], T], *, nice: int = 0) -> T:
    """Call `start` so that the processes that it starts stay on these cores with this niceness.

    On Linux both belong to a thread, and the processes that a thread starts inherit them.
    """

    def within() -> T:
        os.sched_setaffinity(0, cores)
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        return start()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(within).result()


def ahead(pid: int) -> None:
    """Let a session go before others on its cores, if the kernel and the user permit it.

    A kernel with `sched_autogroup` divides a core among sessions. Niceness only counts within one.
    """
    with suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text("-10")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of a process, its children, and the children it has waited for."""
    ticks = 0
    for member in lifeline.family(pid):
        try:
            stat = Path(f"/proc/{member}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += sum(map(int, stat.rpartition(")")[2].split()[11:15]))
    return ticks / _HERTZ


def python() -> Path:
    """Return the faster of this Python and /usr/bin/python3, with the engine's packages.

    pyenv by default builds a Python without profile-guided optimisation. It needs 50 % more time
    for everything, and is not what runs in production.
    """
    ours, systems = Path(sys.executable), Path("/usr/bin/python3")
    if not _recent(systems) or _loop(systems) > 0.9 * _loop(ours):
        return ours
    requirements = [ROOT / f"services/{name}/requirements.txt" for name in ("api", "consumer")]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in requirements)).hexdigest()[:12]
    venv = cache_folder() / f"bench-{digest}"
    if not (venv / ".ready").exists():
        print(f"{systems} is faster than {ours}: making a venv of it, once …", flush=True)
        made = venv / "bin" / "python"
        subprocess.run([systems, "-m", "venv", "--clear", venv], check=True)
        subprocess.run(
            [
                made,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--require-hashes",
                *(f"--requirement={path}" for path in requirements),
            ],
            check=True,
        )
        (venv / ".ready").touch()
    return venv / "bin" / "python"


def _recent(program: Path) -> bool:
    test = "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))"
    return (
        program.exists()
        and subprocess.run([program, "-c", test], capture_output=True, check=False).returncode == 0
    )


def _loop(program: Path) -> float:
    return float(subprocess.run([program, "-c", _LOOP], capture_output=True, check=True).stdout)


def describe(chosen: Path) -> dict[str, str]:
    """Return hardware and versions for the page. `chosen` is the measured Python."""
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = int(re.findall(r"MemTotal:\s*(\d+)", Path("/proc/meminfo").read_text())[0])
    built = "import sys; print(sys.version.split(' (')[0], sys.base_prefix)"
    number, prefix = _output(chosen, "-c", built).split()
    redis = _output(default_binary(), "--version")
    commit = _output("git", "-C", ROOT, "describe", "--always", "--dirty")
    return {
        "machine": f"{os.cpu_count()} cores of {cpu[1] if cpu else platform.processor()}, "
        f"{memory / 2**20:.0f} GiB, Linux {platform.release()}",
        "Python": f"{number} of {prefix}, for the measured processes and the crowd",
        "packages": ", ".join(f"{name} {version(name)}" for name in _MEASURED),
        "Redis": re.sub(r" (sha|malloc|bits|build)\S*", "", redis).strip() + ", AOF everysec",
        "Kafka": f"{kafka_version()}, one node, {java_build(java()).splitlines()[0]}",
        "PostgreSQL": _output(postgres_programs() / "postgres", "--version"),
        "commit": commit,
    }


def load_average() -> str:
    """Return the load average of the last minute."""
    return f"{os.getloadavg()[0]:.1f}"


def _output(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
