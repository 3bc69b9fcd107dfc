"""`make cluster` refuses an unsuitable machine at once, with the reason."""

import os
from pathlib import Path

import pytest

from dev.cluster import node
from dev.stack.errors import StackError


def refused(folder: Path) -> str:
    with pytest.raises(StackError) as error:
        node.Cluster(folder).up()
    assert not list(folder.iterdir())
    return str(error.value)


def test_a_user_other_than_root_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "a node needs Linux and root" in refused(tmp_path)


def test_a_machine_without_control_groups_of_version_1_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(node, "controllers", list)
    assert "has only version 2 of control groups" in refused(tmp_path)


def test_the_missing_packages_are_named_if_they_cannot_be_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(node, "controllers", lambda: ["memory"])
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    message = refused(tmp_path)
    assert "a node needs" in message
    assert "containerd" in message
    assert "apt-get install" in message


def test_a_cluster_that_is_not_running_can_be_stopped_but_not_entered(tmp_path: Path) -> None:
    cluster = node.Cluster(tmp_path)
    cluster.down()
    assert not cluster.runs
    with pytest.raises(StackError, match="start it with: make cluster"):
        cluster.inside("true")
