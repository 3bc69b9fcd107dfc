"""The images of a release in their registry."""

import subprocess
from collections.abc import Iterator

from dev.cluster.binaries import release
from dev.images.building import DEPLOYABLES
from dev.stack.errors import StackError


def pushed(images: str, version: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the digest of each image. Raises StackError if one is missing.

    crane uses the logins of Docker.
    """
    crane = release() / "crane"
    for name in DEPLOYABLES:
        image = f"{images}/flashsale/{name}:{version}"
        done = subprocess.run([crane, "digest", image], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise StackError(f"{image} has no digest: {done.stderr.strip()}")
        yield name, done.stdout.strip()
