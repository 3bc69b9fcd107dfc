"""A process counts as dead only when it has released everything."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dev.stack import lifeline

# With many threads and much memory, the main thread is a zombie before the others have ended.
LISTENER = """
import socket, threading, time
listener = socket.create_server(("127.0.0.1", 0))
memory = bytearray(1) * (300 << 20)
for _ in range(60):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
print(listener.getsockname()[1], flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_killed_process_with_many_threads_has_released_its_port_when_it_counts_as_dead() -> None:
    for _ in range(5):
        command = [sys.executable, "-c", LISTENER]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            process.kill()
            while lifeline.identity(process.pid) is not None:
                pass
            socket.create_server(("127.0.0.1", port)).close()
