"""Command lines of `flashsalectl` for tests."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, TypeAlias

from tests.support.paths import ROOT
from tests.support.simulated_shop import SimulatedShop

SAMPLE: Final = ROOT / "k8s/samples/iphone-15.yaml"
NOWHERE: Final = "127.0.0.1:1"
HEAD: Final = (
    "ITEM        SALE                STATE     ALLOCATED   AVAILABLE   HELD   ACCEPTED   RECORDED"
)

Within: TypeAlias = Callable[[Callable[[SimulatedShop], Awaitable[None]]], None]
"""Runs a coroutine in a shop."""
Ctl: TypeAlias = Callable[..., tuple[int, list[str], list[str]]]
"""Runs a command line. Returns the exit code, the output lines and the error lines."""


def a_file(folder: Path, **spec: object) -> str:
    """Write the sample with changed fields of its spec, and return its path."""
    text = SAMPLE.read_text()
    for name, value in spec.items():
        text = "".join(
            line for line in text.splitlines(keepends=True) if not line.startswith(f"  {name}:")
        )
        text += f"  {name}: {value}\n"
    path = folder / "sale.yaml"
    path.write_text(text)
    return str(path)
