"""A workdir that came from somebody else: nothing outside it is written or removed."""

import json
import os
import time

import pytest

from lora_jax.cli.main import main
from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import atomic_folder
from lora_jax.settings import Settings
from lora_jax.sweeps.cells import Cell
from lora_jax.sweeps.record import PackRecord, read_packs
from lora_jax.train.workdir import claim_cell

CONFIG = {"seed": 0}


@pytest.mark.parametrize("name", ["../../../../w6", "/tmp/w6", "..", ".hidden", "a\0b", "x" * 300])
def test_a_packs_record_cannot_name_a_cell_outside_the_workdir(tmp_path, name):
    settings = Settings.from_config({"seed": 0})
    record = PackRecord((Cell("one", settings), Cell("two", settings)), 1)
    record.write(tmp_path)
    assert [pack.cells[0].name for pack in read_packs(tmp_path)] == ["one"]
    path = record.folder(tmp_path) / "pack.json"
    told = json.loads(path.read_text())
    told["cells"][1]["name"] = name
    path.write_text(json.dumps(told))
    with pytest.raises(RequestError, match="cannot be a folder's name"):
        read_packs(tmp_path)


@pytest.mark.parametrize("what", ["", "metrics.jsonl", "checkpoints", "card.json", "adapter"])
def test_links_out_of_the_workdir_are_refused_before_anything_is_written(tmp_path, what):
    outside, cell = tmp_path / "outside", tmp_path / "workdir" / "cells" / "one"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    link = cell / what if what else cell
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(outside / "precious" if "." in what else outside)
    with pytest.raises(RequestError, match="outside the workdir"):
        claim_cell(cell, CONFIG)
    assert [path.name for path in outside.iterdir()] == ["precious"]
    assert (outside / "precious").read_text() == "precious"


def test_texts_are_not_written_through_a_link_to_a_cell(tmp_path, capsys):
    outside, cell = tmp_path / "outside", tmp_path / "workdir" / "cells" / "one"
    outside.mkdir()
    (outside / "config.json").write_text("{}")
    cell.parent.mkdir(parents=True)
    cell.symlink_to(outside)
    assert main(["evaluate", str(tmp_path / "workdir"), "--texts=1"]) == 2
    assert "outside the workdir" in capsys.readouterr().err
    assert [path.name for path in outside.iterdir()] == ["config.json"]


def test_a_workdir_may_itself_be_a_link_and_hold_links_to_itself(tmp_path):
    real = tmp_path / "real"
    (real / "cells" / "one").mkdir(parents=True)
    (real / "elsewhere").mkdir()
    (real / "cells" / "one" / "checkpoints").symlink_to(real / "elsewhere")
    (tmp_path / "workdir").symlink_to(real)
    claim_cell(tmp_path / "workdir" / "cells" / "one", CONFIG)
    assert (real / "cells" / "one" / "config.json").exists()


def test_what_a_killed_merge_left_is_removed_by_the_next_one_and_nothing_else_is(tmp_path):
    old, young, other = (
        tmp_path / name for name in (".model.abcd_123.tmp", ".model.00000000.tmp", ".model.my.tmp")
    )
    for folder in (old, young, other):
        folder.mkdir()
        (folder / "half").write_text("half")
    for folder in (old, other):
        os.utime(folder, (time.time() - 3600,) * 2)
    with atomic_folder(tmp_path / "model") as temporary:
        (temporary / "whole").write_text("whole")
    assert not old.exists()
    assert young.exists() and other.exists() and (tmp_path / "model" / "whole").exists()
