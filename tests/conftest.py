"""Which tests run, and the fixtures that all of them share."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from dev.cluster.binaries import NoGoError, require_go

pytest_plugins = ["tests.support.servers", "tests.support.api", "tests.support.orders"]

TESTS: Final = Path(__file__).parent
QUICK: Final = (
    "unit",
    "model",
    "chart",
    "servers/contract",
    "servers/api",
    "servers/consumer",
    "servers/operator",
)
"""The folders of `make test`, without their tests marked `slow`."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick",
        action="store_true",
        help="only the quick tests: no Go, no build, about five minutes",
    )
    parser.addoption(
        "--rest",
        action="store_true",
        help="only the tests that --quick leaves out, or may skip because Helm is missing",
    )


def pytest_configure() -> None:
    """Let programs under test end by Ctrl-C.

    A shell lets its background jobs ignore it, and their children would inherit this.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Skip the slow folders with --quick, and tests/e2e unless the command line names it.

    The end-to-end tests need root, Debian and several minutes.
    """
    if collection_path.name == "e2e":
        named = any("e2e" in argument for argument in config.invocation_params.args)
        return None if named else True
    if not config.getoption("quick") or not collection_path.is_dir():
        return None
    place = collection_path.relative_to(TESTS)
    contains_quick = any(place in (Path(each), *Path(each).parents) for each in QUICK)
    return None if contains_quick or _in_quick_folder(collection_path) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the slow tests with --quick, and the quick tests with --rest.

    A test is slow if it is marked so, needs a Kubernetes API, or is not in a folder of QUICK.
    """

    def quick(item: pytest.Item) -> bool:
        slow = item.get_closest_marker("slow") is not None or "kubernetes" in _needs(item)
        return not slow and _in_quick_folder(item.path)

    def selected(item: pytest.Item) -> bool:
        if config.getoption("quick"):
            return quick(item)
        return not config.getoption("rest") or not quick(item) or "chart" in _needs(item)

    if left_out := [item for item in items if not selected(item)]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if selected(item)]


def _in_quick_folder(path: Path) -> bool:
    return any(path.is_relative_to(TESTS / each) for each in QUICK)


def _needs(item: pytest.Item) -> Sequence[str]:
    """Return the names of the fixtures of a test."""
    return getattr(item, "fixturenames", ())


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a program built with Go on a machine without it. In CI they fail.

    Skipping here instead of in the fixture makes it one line of pytest's summary.
    """
    needs = _needs(item)
    builds_helm = "chart" in needs and not item.config.getoption("quick")
    builds_release = "release_tools" in needs
    if "kubernetes" not in needs and not builds_helm and not builds_release:
        return
    try:
        require_go()
    except NoGoError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error), pytrace=False)
        needed = "the tools of a release" if builds_release else "a real Kubernetes API"
        pytest.skip(f"needs {needed}: {error}")
