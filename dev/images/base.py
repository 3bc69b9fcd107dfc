"""A stand-in for the base image, where no registry can be asked for the real one.

Debian's Python with pip where the real one has it, under the real one's name, so that the
Dockerfiles need not know. An image on it is for this machine: nobody should ship it.
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
"""The Debian that has a Python."""
_PACKAGES: Final = ("python3", "python3-venv", "ca-certificates")
# Debian refuses to install into /usr/local with a pip that came as a package, and keeps pip's
# wheel. An empty pip.conf is there for the machine's own to be mounted on, which leaves no trace.
_HOOK: Final = """\
rm /usr/lib/python3.*/EXTERNALLY-MANAGED
pip=$(ls /usr/share/python-wheels/pip-*.whl)
PYTHONPATH=$pip python3 -m pip install --quiet --no-index --root-user-action ignore $pip
: >/etc/pip.conf
rm -rf /root/.cache
"""
_LABEL: Final = "dev.flashsale.stand-in"


def python_version() -> str:
    """The Python that the Dockerfiles name; all the same one."""
    named: set[str] = {
        version
        for folder in ("services", "operator", "dev")
        for path in (ROOT / folder).glob("**/Dockerfile")
        for version in re.findall(r"^ARG PYTHON_VERSION=(\S+)$", path.read_text(), re.MULTILINE)
    }
    if len(named) != 1:
        raise StackError(f"the Dockerfiles name several versions of Python: {sorted(named)}")
    return named.pop()


def stand_in(buildah: Buildah) -> str:
    """The name of the base image, made first if need be (a minute), with progress on stderr."""
    version = python_version()
    if version not in _SUITES:
        raise StackError(f"no Debian has Python {version}; a stand-in can be {sorted(_SUITES)}")
    suite, name = _SUITES[version], f"python:{version}-slim"
    command = [
        *("mmdebstrap", "--quiet", "--variant=minbase", "--mode=root"),
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
    say(f"{title}, once; about a minute")
    archive = buildah.folder / "base.tar"
    code, said = run(
        [*command, str(archive)],
        folder=ROOT,
        environment=dict(os.environ),
        log=buildah.folder / "base.log",
        show=lambda _: progress.show(f"{title}, {{seconds}} s"),
    )
    if code != 0:
        tail = "\n".join(f"    {line}" for line in said[-20:])
        raise StackError(f"mmdebstrap failed (exit code {code}); its last words:\n{tail}")
    buildah.commit(
        archive,
        name,
        *("--cmd", "python3", "--label", f"{_LABEL}={key}"),
        *("--env", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    )
    archive.unlink()
    progress.end(f"{title}: made, in {{seconds}} s")
    return name
