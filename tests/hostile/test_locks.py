"""A workdir's lock is a regular file of its own: no link followed, no FIFO waited for."""

import os

import pytest

from lora_jax.core.errors import RequestError
from lora_jax.train.workdir import claim_cell, is_locked, lock_workdir


def test_a_lock_that_is_a_link_leaves_its_target_as_it_was(tmp_path):
    precious, workdir = tmp_path / "precious", tmp_path / "workdir"
    precious.write_text("precious")
    workdir.mkdir()
    (workdir / ".lock").symlink_to(precious)
    for use in (lambda: lock_workdir(workdir).__enter__(), lambda: is_locked(workdir)):
        with pytest.raises(RequestError, match="no regular file; remove it"):
            use()
    assert precious.read_text() == "precious"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "folder"])
def test_a_lock_that_is_no_file_is_refused_at_once(tmp_path, make):
    make(tmp_path / ".lock")
    for use in (lambda: lock_workdir(tmp_path).__enter__(), lambda: is_locked(tmp_path)):
        with pytest.raises(RequestError, match="no regular file"):
            use()


def test_a_lock_whose_link_leads_nowhere_creates_nothing(tmp_path):
    (tmp_path / "workdir").mkdir()
    (tmp_path / "workdir" / ".lock").symlink_to(tmp_path / "new")
    with pytest.raises(RequestError, match="no regular file"), lock_workdir(tmp_path / "workdir"):
        pass
    assert not (tmp_path / "new").exists()


def test_only_our_own_temporary_names_are_removed(tmp_path):
    cell = tmp_path / "cells" / "one"
    cell.mkdir(parents=True)
    ours = [".card.json.abcd_123.tmp", ".adapter.0a1b2c3d.tmp"]
    theirs = [".notes.tmp", ".card.json.tmp", "card.json.tmp"]
    for name in (*ours, *theirs):
        (cell / name).write_text("x")
    claim_cell(cell, {"seed": 0})
    assert {p.name for p in cell.iterdir()} == {*theirs, "config.json"}
