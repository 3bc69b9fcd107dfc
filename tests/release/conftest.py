"""The programs that the tests of a release share."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dev.cluster.binaries import release
from dev.stack import loopback
from dev.stack.ports import free_port
from tests.support.eventually import eventually


@pytest.fixture(scope="session")
def release_tools(request: pytest.FixtureRequest) -> Path:
    """The folder of actionlint and crane, which the first call builds."""
    capture = request.config.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        return release()


@pytest.fixture(scope="module")
def registry(release_tools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a registry on loopback, which starts empty."""
    address = f"127.0.0.1:{free_port()}"
    path = tmp_path_factory.mktemp("registry") / "log"
    with path.open("w") as log:
        process = subprocess.Popen(
            [release_tools / "crane", "registry", "serve", "--address", address],
            stdout=log,
            stderr=log,
        )
    try:
        eventually(lambda: _answers(address), path.read_text)
        yield address
    finally:
        process.terminate()
        process.wait()


def _answers(address: str) -> bool:
    try:
        with loopback.get(f"http://{address}/v2/", timeout_seconds=1) as response:
            return response.status == 200
    except OSError:
        return False
