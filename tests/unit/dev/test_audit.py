"""What `make audit` makes of what pip and pip-audit say; their own words, shortened."""

import re

from dev.audit import LOCKS, ROOT, of_advisories, of_index


def test_a_yanked_package_is_named() -> None:
    fine = {"metadata": {"name": "a", "version": "1"}, "is_yanked": False}
    yanked = {"metadata": {"name": "b", "version": "2"}, "is_yanked": True}
    found = of_index({"install": [fine, yanked]})
    assert (found.packages, found.wrong) == (2, ("b 2 was yanked by its authors",))


def test_a_vulnerable_package_is_named_with_what_mends_it() -> None:
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
    assert found.wrong == ("c 3: PYSEC-1, mended in 3.1",)
    assert found.unknown == ("b",)


def test_every_package_of_an_image_is_pinned_by_hash_to_the_version_that_was_tested() -> None:
    tested = pins((ROOT / "dev" / "requirements.txt").read_text())
    for lock in LOCKS:
        text = lock.read_text()
        pinned = pins(text)
        assert pinned.items() <= tested.items()
        assert text.count(" \\\n    --hash=sha256:") >= len(pinned)
        assert not re.search(r"://|--(extra-)?index-url|--find-links", text)


def pins(lock: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([^ ;]+)", lock, re.MULTILINE))
