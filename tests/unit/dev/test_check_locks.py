"""`make check-locks` reads the reports of pip and pip-audit, shortened here."""

import re
from pathlib import Path

import pytest

from dev.check_locks import LOCKS, of_advisories, of_failure, of_index
from tests.support.paths import ROOT


def test_a_yanked_package_is_reported() -> None:
    fine = {"metadata": {"name": "a", "version": "1"}, "is_yanked": False}
    yanked = {"metadata": {"name": "b", "version": "2"}, "is_yanked": True}
    found = of_index({"install": [fine, yanked]})
    assert (found.packages, found.wrong) == (2, ("b 2 was yanked by its authors",))


def test_a_vulnerable_package_is_reported_with_the_version_that_fixes_it() -> None:
    found = of_advisories(
        {
            "dependencies": [
                {"name": "a", "version": "1", "vulns": []},
                {"name": "b", "skip_reason": "Dependency not found on PyPI"},
                {
                    "name": "c",
                    "version": "3",
                    "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1"], "aliases": []}],
                },
            ],
            "fixes": [],
        }
    )
    assert found.wrong == ("c 3: PYSEC-1, fixed in 3.1",)
    assert found.unchecked == ("b",)
    assert found.reason == "Dependency not found on PyPI"


@pytest.mark.parametrize(
    "error",
    [
        "ERROR:pip_audit._cli:Could not connect to PyPI's vulnerability feed\nERROR:Tip: block",
        "Traceback:\nrequests.exceptions.ProxyError: HTTPSConnectionPool(host='pypi.org')",
    ],
)
def test_packages_are_unchecked_if_no_advisory_service_can_be_reached(
    tmp_path: Path, error: str
) -> None:
    lock = tmp_path / "lock.txt"
    lock.write_text("a==1 --hash=sha256:1\n")
    found = of_failure(error, lock)
    assert (found.packages, found.wrong) == (1, ())
    assert found.unchecked == ("a==1 --hash=sha256:1",)
    assert re.search(r"cannot be reached: \S.*(feed|pypi\.org)", found.reason)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            "ERROR:old\nERROR:lock.txt is invalid at line 2:\n  a=1\n   ^\n",
            "ERROR:lock.txt is invalid",
        ),
        ("Traceback:\nKeyError: 'x'\n", "KeyError"),
        ("", "no report"),
    ],
)
def test_an_error_of_pip_audit_itself_is_a_failure(tmp_path: Path, error: str, told: str) -> None:
    (found,) = of_failure(error, tmp_path).wrong
    assert found.startswith(f"pip-audit: {told}")


def test_every_package_of_an_image_is_pinned_by_hash_to_the_tested_version() -> None:
    tested = pins((ROOT / "dev" / "requirements.txt").read_text())
    for lock in LOCKS:
        text = lock.read_text()
        pinned = pins(text)
        assert pinned.items() <= tested.items()
        assert text.count(" \\\n    --hash=sha256:") >= len(pinned)
        assert not re.search(r"://|--(extra-)?index-url|--find-links", text)


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^ ;]+)", lock, re.MULTILINE))
