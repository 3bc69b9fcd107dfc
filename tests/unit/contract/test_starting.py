"""A container's first process ends at SIGTERM also while it starts."""

import signal
import subprocess
import sys

import pytest

_IMPORT_FOR_EVER = """
import runpy, sys, time

class Finder:
    def find_spec(self, name, *_):
        if name == "{package}.app":
            print("importing", flush=True)
            time.sleep(60)

sys.meta_path.insert(0, Finder())
runpy.run_module("{package}", run_name="__main__")
"""


@pytest.mark.parametrize("package", ["flashsale_consumer", "flashsale_operator"])
def test_sigterm_during_the_imports_ends_a_process(package: str) -> None:
    """The kernel drops a signal of process 1 for which it has no handler."""
    program = _IMPORT_FOR_EVER.format(package=package)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"importing\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0
