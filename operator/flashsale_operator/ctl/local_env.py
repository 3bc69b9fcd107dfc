"""Finds the servers of `make up` through the file .local/env of a checkout."""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from flashsale.settings import PREFIX

FILE: Final = Path(".local") / "env"
_MARK: Final = "pyproject.toml"
_ADDRESSES: Final = tuple(
    f"{PREFIX}{name}" for name in ("REDIS_URL", "DATABASE_URL", "KAFKA_BOOTSTRAP")
)


def environment(environ: Mapping[str, str], folder: Path) -> tuple[Mapping[str, str], str]:
    """Returns the variables of `environ`, completed by the file of the checkout around `folder`.

    The file is read only if `environ` lacks an address. The second value is a sentence about the
    file for an error, or empty if the file does not matter.
    """
    if all(name in environ for name in _ADDRESSES):
        return environ, ""
    path = next(
        (
            parent / FILE
            for parent in (folder, *folder.parents)
            if _is_file(parent / FILE) and _is_file(parent / _MARK)
        ),
        None,
    )
    if path is None:
        return environ, (
            "set the variables, or run flashsalectl in a checkout after `make up`: no checkout "
            f"with {FILE} contains {folder}"
        )
    try:
        lines = path.read_text(errors="replace").splitlines()
    except OSError as error:
        return environ, f"{path} cannot be read: {error.strerror}"
    found = {name: value for name, value in variables(lines).items() if name.startswith(PREFIX)}
    return found | dict(environ), f"addresses that are not in the environment come from {path}"


def variables(lines: Iterable[str]) -> dict[str, str]:
    """Returns the variables that a shell would set."""
    pairs = (line.partition("=") for line in lines)
    return {name: _unquoted(value) for name, _, value in pairs}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder of another user
        return False


def _unquoted(value: str) -> str:
    try:
        return "".join(shlex.split(value))
    except ValueError:  # a quotation mark without another one
        return value
