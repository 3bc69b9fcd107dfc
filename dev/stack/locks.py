"""File locks between processes of one machine."""

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def exclusive(
    path: Path, *, waiting: Callable[[], None] = lambda: None, remove: bool = False
) -> Iterator[None]:
    """Hold the lock of a path, which need not exist.

    The lock is the file `PATH.lock`. Its folder is created if it is missing. If another process
    holds the lock, `waiting` is called once before the wait. The kernel releases the lock when the
    process ends, even if it is killed. With `remove`, the file is removed in the end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.with_name(path.name + ".lock")
    while True:
        with file.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waiting()
                fcntl.flock(lock, fcntl.LOCK_EX)
            if _is_at(file, lock):
                yield
                if remove:
                    file.unlink()
                return


def _is_at(file: Path, lock: IO[str]) -> bool:
    """Return whether this open file still has its name.

    If its former holder has removed it, another process can hold the lock of a new file.
    """
    try:
        return file.stat().st_ino == os.fstat(lock.fileno()).st_ino
    except FileNotFoundError:
        return False
