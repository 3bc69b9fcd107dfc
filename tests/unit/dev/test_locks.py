"""File locks between processes, here between two threads."""

import fcntl
import threading
from pathlib import Path

from dev.stack.locks import exclusive


def free(path: Path) -> bool:
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_lock_can_leave_no_file(tmp_path: Path) -> None:
    path = tmp_path / "cluster"
    with exclusive(path, remove=True):
        assert not free(path)
    assert list(tmp_path.iterdir()) == []


def test_a_removed_lock_is_exclusive_for_a_process_that_waited_for_it(tmp_path: Path) -> None:
    path = tmp_path / "cluster"
    waits, holds, end = threading.Event(), threading.Event(), threading.Event()

    def wait_for_it() -> None:
        with exclusive(path, waiting=waits.set):
            holds.set()
            end.wait()

    other = threading.Thread(target=wait_for_it)
    with exclusive(path, remove=True):
        other.start()
        assert waits.wait(30)
    assert holds.wait(30)
    try:
        assert not free(path)
    finally:
        end.set()
        other.join()
