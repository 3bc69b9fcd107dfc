"""The API while a DNS server does not answer. Needs Redis, and Linux with user namespaces."""

import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT
from typing import Final

import pytest

APART: Final = ("unshare", "--map-root-user", "--net", "--mount")
"""Runs a program with a network and with mounts of its own."""


@pytest.mark.slow
def test_names_of_kafka_that_are_not_answered_delay_no_call_of_redis(tmp_path: Path) -> None:
    if (
        not shutil.which("unshare")
        or subprocess.run([*APART, "true"], check=False, stderr=PIPE).returncode
    ):
        pytest.skip("needs the right to make namespaces")
    program = [*APART, sys.executable, "-m", "tests.support.silent_dns", str(tmp_path)]
    ended = subprocess.run(program, stdout=PIPE, stderr=STDOUT, text=True, timeout=120, check=False)
    assert ended.stdout.startswith("202\n"), ended.stdout
    assert "never retrieved" not in ended.stdout
