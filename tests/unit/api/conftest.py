"""Fixtures of the API's unit tests."""

import pytest

from flashsale_api import calls
from tests.support.batcher import NEVER_SECONDS


@pytest.fixture
def no_request_expires(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine, the last of many requests can wait longer than a buyer may.

    A reply can also come so late that the call is repeated.
    """
    monkeypatch.setattr(calls, "MAX_WAIT_SECONDS", NEVER_SECONDS)
    monkeypatch.setattr(calls, "CALL_DEADLINE_SECONDS", NEVER_SECONDS)
