"""Builds a stand-in for the base image on machines without access to a registry.

The stand-in is Debian's Python, with pip in the same place as in the real image. Builds pass its
name as PYTHON_IMAGE, which otherwise names the real image with its digest. Images on this base are
for tests on this machine and must not be shipped.
"""

import hashlib
import os
import re
from typing import Final

from dev.images.buildah import Buildah
from dev.paths import ROOT
from dev.progress import Progress, run, say
from dev.stack.errors import StackError

_SUITES: Final = {"3.11": "bookworm", "3.13": "trixie"}
"""The Debian release with each version of Python."""
_PACKAGES: Final = ("python3", "python3-venv", "ca-certificates")
# Debian's packaged pip refuses to install into /usr/local, so pip is installed from Debian's wheel.
# The machine's pip.conf is mounted over the empty one during builds and leaves no trace.
_HOOK: Final = """\
rm /usr/lib/python3.*/EXTERNALLY-MANAGED
pip=$(ls /usr/share/python-wheels/pip-*.whl)
PYTHONPATH=$pip python3 -m pip install --quiet --no-index --root-user-action ignore $pip
: >/etc/pip.conf
rm -rf ~/.cache
"""
_IMAGE: Final = re.compile(r"^ARG PYTHON_IMAGE=python:([\d.]+)-slim\b", re.MULTILINE)
_LABEL: Final = "dev.flashsale.stand-in"


def python_version() -> str:
    """Return the Python version of the Dockerfiles. Raises StackError if they differ."""
    named: set[str] = {
        version
        for folder in ("services", "operator", "dev")
        for path in (ROOT / folder).glob("**/Dockerfile")
        for version in re.findall(
            r"^ARG PYTHON_IMAGE=python:([\d.]+)-slim\b", path.read_text(), re.MULTILINE
        )
    }
    if len(named) != 1:
        raise StackError(f"the Dockerfiles have different versions of Python: {sorted(named)}")
    return named.pop()


def stand_in(buildah: Buildah) -> str:
    """Return the name of the base image. The first call builds it, which takes a minute."""
    version = python_version()
    if version not in _SUITES:
        raise StackError(f"no Debian release has Python {version}, only {sorted(_SUITES)}")
    suite, name = _SUITES[version], f"python:{version}-slim"
    command = [
        "mmdebstrap",
        "--quiet",
        "--variant=minbase",
        "--mode=root",
        *(f"--dpkgopt=path-exclude=/usr/share/{each}/*" for each in ("doc", "man", "locale")),
        f"--include={','.join(_PACKAGES)}",
        f"--customize-hook=chroot \"$1\" sh -euc '{_HOOK}'",
        suite,
    ]
    key = hashlib.sha256("\0".join(command).encode()).hexdigest()[:12]
    if buildah.label(name, _LABEL) == key:
        return name
    progress = Progress()
    title = f"{name}: a stand-in from Debian {suite}"
    say(f"{title}; takes about a minute, once")
    archive = buildah.folder / "base.tar"
    code, output = run(
        [*command, str(archive)],
        folder=ROOT,
        environment=dict(os.environ),
        log=buildah.folder / "base.log",
        show=lambda _: progress.show(f"{title}, {{seconds}} s"),
    )
    if code != 0:
        tail = "\n".join(f"    {line}" for line in output[-20:])
        raise StackError(f"mmdebstrap failed (exit code {code}). The end of its output:\n{tail}")
    buildah.commit(
        archive,
        name,
        "--cmd=python3",
        f"--label={_LABEL}={key}",
        "--env=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    )
    archive.unlink()
    progress.end(f"{title}: built in {{seconds}} s")
    return name
