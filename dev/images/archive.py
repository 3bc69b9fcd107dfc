"""Writes images as one OCI layout, in which shared layers are stored once."""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dev.images.buildah import buildah
from dev.stack.errors import StackError
from dev.stack.locks import exclusive


def save(names: Mapping[str, str], archive: Path) -> None:
    """Write built images into an archive for `ctr images import` and `podman load`.

    `names` maps each reference to its name in the archive. Nothing is compressed, because the
    archive does not cross a network and compression would take longer than everything else.
    Raises StackError.
    """
    try:
        archive.touch()  # before buildah is looked for
    except OSError as error:
        raise StackError(f"{archive}: {error.strerror}") from None
    tool = buildah()
    index: list[dict[str, Any]] = []
    with exclusive(tool.folder / "store"), tarfile.open(archive, "w") as tar:
        added: set[str] = set()

        def add(digest: str, content: bytes | Path) -> None:
            if digest not in added:
                added.add(digest)
                at = f"blobs/{digest.replace(':', '/')}"
                if isinstance(content, Path):
                    tar.add(content, at)
                else:
                    _write(tar, at, content)

        for reference, name in names.items():
            with TemporaryDirectory(dir=tool.folder) as folder:
                tool.ask("push", "--quiet", "--disable-compression", reference, f"dir:{folder}")
                content = (Path(folder) / "manifest.json").read_bytes()
                manifest = json.loads(content)
                for blob in (manifest["config"], *manifest["layers"]):
                    add(blob["digest"], Path(folder) / blob["digest"].partition(":")[2])
            digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
            add(digest, content)
            index.append(
                {
                    "mediaType": manifest["mediaType"],
                    "digest": digest,
                    "size": len(content),
                    "annotations": {"org.opencontainers.image.ref.name": _full(name)},
                }
            )
        _write(tar, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        whole = {"schemaVersion": 2, "manifests": index}
        _write(tar, "index.json", json.dumps(whole).encode())


def _write(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _full(name: str) -> str:
    """Return the name with Docker Hub's host and library, which readers add to short names."""
    host, slash, _ = name.partition("/")
    if not slash:
        return f"docker.io/library/{name}"
    return name if "." in host else f"docker.io/{name}"
