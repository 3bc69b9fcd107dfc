"""loadtest/stampede.sh reports the result of its Job. A stand-in for kubectl has its states."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

KUBECTL = """#!/bin/sh
case "$*" in
  "get flashsale "*) echo 0 ;;
  "logs "*) echo "k6 has ended" ;;
  "get job "*)
    head -n 1 "$STATES"
    sed -i '1{$!d}' "$STATES" ;;
  *"-f -") cat > /dev/null ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["", "FailureTarget", "FailureTarget Failed"], 1),
        (["", "SuccessCriteriaMet", "SuccessCriteriaMet Complete"], 0),
    ],
    ids=["failed", "complete"],
)
def test_the_script_waits_for_the_final_condition_of_its_job(
    tmp_path: Path, states: list[str], code: int
) -> None:
    """Kubernetes announces the end of a Job with a condition before the final one."""
    kubectl, file = tmp_path / "kubectl", tmp_path / "states"
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    file.write_text("".join(f"{each}\n" for each in states))
    done = subprocess.run(
        ["sh", ROOT / "loadtest" / "stampede.sh"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "STATES": str(file)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, file.read_text()) == (code, f"{states[-1]}\n"), done.stderr
