"""A machine that cannot be a node is told why, before minutes are spent on it."""

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


def test_who_is_not_root_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "a node takes Linux and root" in refused(tmp_path)


def test_a_machine_without_the_first_version_of_control_groups_is_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(node, "controllers", list)
    assert "version 2 of control groups only" in refused(tmp_path)


def test_where_packages_cannot_be_installed_it_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(node, "controllers", lambda: ["memory"])
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    said = refused(tmp_path)
    assert "a node needs" in said
    assert "containerd" in said
    assert "apt-get install" in said


def test_what_does_not_run_can_be_ended_and_not_entered(tmp_path: Path) -> None:
    cluster = node.Cluster(tmp_path)
    cluster.down()
    assert not cluster.runs
    with pytest.raises(StackError, match="start it with: make cluster"):
        cluster.inside("true")
