"""Environments of processes that a test starts."""

import os
from pathlib import Path


def without_servers(home: Path) -> dict[str, str]:
    """Return the least settings with which each process starts. No server answers there."""
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "FLASHSALE_KAFKA_BOOTSTRAP": "127.0.0.1:1",
        "FLASHSALE_REDIS_URL": "redis://127.0.0.1:1",
        "FLASHSALE_DATABASE_URL": "postgresql://u:p@127.0.0.1:1/db",
    }
