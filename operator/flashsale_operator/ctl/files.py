"""Read the files of `flashsalectl apply -f`, those of `kubectl apply -f`, and write reports."""

import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final

from flashsale.errors import FlashsaleError
from flashsale.sale import SaleSpec
from flashsale_operator.sales import manifest
from flashsale_operator.sales.manifest import ManifestError

MAX_BYTES: Final = 8 * 1024 * 1024
"""The size of an export of some thousand FlashSales."""
_SUFFIXES: Final = (".json", ".yaml", ".yml")
_STDIN: Final = "-"


class NotWritten(FlashsaleError):
    """A file cannot be written."""


def sales(names: Sequence[str]) -> list[SaleSpec]:
    """Returns the sales of all files. Raises `ManifestError` with the mistakes of all files.

    A name is a file, a directory, `-` for standard input, or several of them with commas between.
    """
    specs: dict[str, SaleSpec] = {}
    mistakes: list[str] = []
    for file in _files(names, mistakes):
        shown = "standard input" if file == _STDIN else file
        try:
            for spec in manifest.parse(_read(file)):
                if spec.sale_id in specs:
                    mistakes.append(f"{shown}: metadata.name: {spec.sale_id} appears twice")
                specs[spec.sale_id] = spec
        except ManifestError as error:
            mistakes += [f"{shown}: {mistake}" for mistake in error.mistakes]
    if not specs and not mistakes:
        mistakes.append(f"{','.join(names)}: contains no FlashSale")
    if mistakes:
        raise ManifestError(mistakes)
    return list(specs.values())


def write(path: Path, text: str) -> None:
    """Writes a file in UTF-8. Raises `NotWritten`."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise NotWritten(f"{path}: cannot be written: {error.strerror}") from None


def _files(names: Sequence[str], mistakes: list[str]) -> Iterator[str]:
    """Yields files, and the manifests of directories, without those of their own directories."""
    for name in chain.from_iterable(given.split(",") for given in names):
        if not name:
            mistakes.append("-f: the name of a file is empty")
            continue
        try:
            if name == _STDIN or not Path(name).is_dir():
                yield name
                continue
            found = [
                str(path)
                for path in Path(name).iterdir()
                if path.suffix in _SUFFIXES and not path.is_dir()
            ]
        except (OSError, ValueError) as error:
            mistakes.append(f"{name}: {_why(error)}")
            continue
        if not found:
            mistakes.append(f"{name}: contains no file that ends in .json, .yaml or .yml")
        yield from sorted(found)


def _read(name: str) -> str:
    try:
        if name == _STDIN:
            if sys.stdin is None:  # after `<&-`
                raise ManifestError(["cannot be read: it is closed"])
            data = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with Path(name).open("rb") as file:
                data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ManifestError([_why(error)]) from None
    if len(data) > MAX_BYTES:
        raise ManifestError(["cannot be read: larger than 8 MiB"])
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ManifestError(["cannot be read: not UTF-8"]) from None


def _why(error: OSError | ValueError) -> str:
    why = error.strerror if isinstance(error, OSError) else "not a file name"
    return f"cannot be read: {why}"
