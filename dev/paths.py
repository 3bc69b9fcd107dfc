"""Folders of the checkout."""

from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
LOCAL: Final = ROOT / ".local"
"""Data and logs of everything that runs from this checkout. Git ignores this folder."""
