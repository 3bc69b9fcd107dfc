"""Which tests run, and the fixtures that all of them share."""

import os
from pathlib import Path
from typing import Final

import pytest

from dev.cluster.binaries import NoGoError, require_go

pytest_plugins = ["tests.support.servers", "tests.support.api"]

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
        help="only the quick tests: no Go, no build, at most five minutes",
    )


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
    quick = any(place in (Path(each), *Path(each).parents) for each in QUICK)
    return None if quick or any(place.is_relative_to(each) for each in QUICK) else True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect slow tests, and tests that need a Kubernetes API, with --quick."""
    if not config.getoption("quick"):
        return

    def slow(item: pytest.Item) -> bool:
        needs = getattr(item, "fixturenames", ())
        return item.get_closest_marker("slow") is not None or "kubernetes" in needs

    if left_out := [item for item in items if slow(item)]:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not slow(item)]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests that need a Kubernetes API on a machine without Go. In CI they fail.

    Skipping here instead of in the fixture makes it one line of pytest's summary.
    """
    needs = getattr(item, "fixturenames", ())
    builds_helm = "chart" in needs and not item.config.getoption("quick")
    if "kubernetes" not in needs and not builds_helm:
        return
    try:
        require_go()
    except NoGoError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(str(error), pytrace=False)
        pytest.skip(f"needs a real Kubernetes API: {error}")
