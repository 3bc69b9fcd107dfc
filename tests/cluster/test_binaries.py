"""The build of Kubernetes, with a fake Go that makes empty programs at once."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dev.stack import lifeline
from tests.support.eventually import eventually
from tests.support.paths import ROOT

NAMES = {"etcd", "kube-apiserver", "kubectl"}
GO = """#!/bin/sh
case $1 in
env) printf '{"GOVERSION": "%s", "GOOS": "linux", "GOARCH": "amd64"}' "${FAKE_VERSION:-go1.26.8}" ;;
list) echo a/package ;;
build)
  echo $$ >>"$FAKE_BUILDS"
  for word; do [ "$last" = -o ] && folder=$word; last=$word; done
  eval "$FAKE_BUILDING"
  mkdir "$folder" && touch "${folder}server" "${folder}kube-apiserver" "${folder}kubectl" ;;
esac
"""


class Machine:
    """A user's machine with its PATH and its cache."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.cache = folder / "cache"
        self.builds = folder / "builds"
        self.builds.touch()
        self.environment = {
            "PATH": f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin",
            "HOME": str(folder),
            "FLASHSALE_CACHE": str(self.cache),
            "FAKE_BUILDS": str(self.builds),
        }

    def go(self, program: str = GO) -> None:
        (self.bin / "go").write_text(program)
        (self.bin / "go").chmod(0o755)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "dev.cluster", "build"],
            cwd=ROOT,
            env={**self.environment, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def build(self, **variables: str) -> tuple[int, str, str]:
        """Return the exit code, the standard output and the standard error."""
        with self.start(**variables) as process:
            out, err = process.communicate()
        return process.returncode, out, err

    @property
    def built(self) -> list[Path]:
        return [path for path in self.cache.glob("cluster/*") if path.suffix != ".lock"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_second_build_uses_the_cache(machine: Machine) -> None:
    machine.go()
    code, out, err = machine.build()
    assert (code, "built in" in err) == (0, True)
    (folder,) = machine.built
    assert out.endswith(f"{folder}\n")
    assert {path.name for path in folder.iterdir()} == NAMES
    assert machine.build() == (0, out, "")
    assert len(machine.builds.read_text().splitlines()) == 1


def test_another_version_of_go_builds_again(machine: Machine) -> None:
    machine.go()
    machine.build()
    machine.build(FAKE_VERSION="go1.27.0")
    assert len(machine.built) == 2


def test_two_concurrent_sessions_build_once(machine: Machine) -> None:
    machine.go()
    with machine.start(FAKE_BUILDING="sleep 2") as first:
        eventually(lambda: machine.builds.read_text() != "")
        code, out, err = machine.build()
        assert (code, "waiting for another process" in err) == (0, True)
        assert first.communicate()[0] == out
    assert len(machine.builds.read_text().splitlines()) == 1


def test_a_failed_build_prints_the_reason_and_the_remedy_and_can_be_repeated(
    machine: Machine,
) -> None:
    machine.go()
    code, out, err = machine.build(FAKE_BUILDING="echo no such module >&2; exit 3")
    assert (code, out) == (1, "")
    assert "`go build` failed (exit code 3); check the network" in err
    assert "    no such module" in err
    assert "Traceback" not in err
    assert machine.build()[0] == 0
    assert len(machine.built) == 1


def test_a_killed_session_leaves_no_running_build_and_no_incomplete_folder(
    machine: Machine,
) -> None:
    machine.go()
    with machine.start(FAKE_BUILDING="sleep 100; true") as session:
        eventually(lambda: machine.builds.read_text().endswith("\n"))
        build = int(machine.builds.read_text())
        eventually(lambda: len(lifeline.family(build)) == 2)
        running = {pid: lifeline.identity(pid) for pid in lifeline.family(build)}
        session.send_signal(signal.SIGKILL)
    eventually(lambda: all(lifeline.identity(pid) != was for pid, was in running.items()))
    assert machine.build()[0] == 0
    (folder,) = machine.built
    assert {path.name for path in folder.iterdir()} == NAMES


@pytest.mark.parametrize(
    ("program", "words"),
    [
        (None, "no Go on this machine"),
        (GO.replace("go1.26.8", "go1.23.9"), "is too old (go1.23.9)"),
        ("#!/bin/sh\necho toolchain not available >&2; exit 1\n", "toolchain not available"),
    ],
    ids=["no Go", "too old", "broken"],
)
def test_an_unusable_go_is_reported_in_one_line(
    machine: Machine, program: str | None, words: str
) -> None:
    if program is None:
        machine.environment["PATH"] = str(machine.bin)
    else:
        machine.go(program)
    code, out, err = machine.build()
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert words in err
    assert "install Go 1.24 or newer" in err


@pytest.mark.parametrize(("ci", "outcome"), [("", "skipped"), ("true", "error")])
def test_without_go_the_tests_are_skipped_with_one_line_but_fail_in_ci(
    machine: Machine, ci: str, outcome: str
) -> None:
    """Run the tests of the control plane in another pytest."""
    tests = Path(__file__).with_name("test_control_plane.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tests)],
        cwd=ROOT,
        env={**machine.environment, "PATH": str(machine.bin), "CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert (done.returncode == 0) == (outcome == "skipped")
    assert outcome in lines[-1]
    assert "passed" not in lines[-1]
    if outcome == "skipped":
        assert sum("needs a real Kubernetes API: no Go" in li for li in lines) == 1
