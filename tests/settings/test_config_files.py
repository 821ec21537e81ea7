"""Config files: where they are found, what they may import, and the one that `init` writes."""

import re
from pathlib import Path

import pytest

from lora_jax.cli.main import main
from lora_jax.cli.requests import read_config
from lora_jax.core.errors import RequestError
from lora_jax.settings import config as configs

ROOT = Path(__file__).parents[2]
CONFIG = """\
from {} import RANK
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({{"method": {{"name": "lora", "rank": RANK}}}})
"""


@pytest.mark.parametrize("module", [".shared", "shared_by_its_name"])
def test_a_config_imports_its_neighbours_and_two_folders_do_not_meet(tmp_path, module):
    for rank, folder in ((2, "a"), (3, "b")):
        own = tmp_path / folder
        own.mkdir()
        neighbour = module.lstrip(".") + ("" if module[0] == "." else folder)
        (own / f"{neighbour}.py").write_text(f"RANK = {rank}\n")
        (own / "mine.py").write_text(CONFIG.format(("." if module[0] == "." else "") + neighbour))
        assert configs.run_file(own / "mine.py")["get_config"]().method.rank == rank


def test_a_config_within_a_package_imports_from_above(tmp_path):
    inner = tmp_path / "project" / "configs"
    inner.mkdir(parents=True)
    for folder in (inner, inner.parent):
        (folder / "__init__.py").write_text("")
    (inner.parent / "shared.py").write_text("RANK = 5\n")
    (inner / "mine.py").write_text(CONFIG.format("..shared"))
    assert configs.run_file(inner / "mine.py")["get_config"]().method.rank == 5


def test_a_file_is_executed_afresh_each_time(tmp_path):
    file = tmp_path / "mine.py"
    for rank in (1, 2):
        file.write_text(f"RANK = {rank}{' ' * rank}\n")
        assert configs.run_file(file)["RANK"] == rank


def test_shipped_configs_are_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = read_config(["--config=what_rank:smoke"])
    by_path = read_config([f"--config={ROOT}/experiments/configs/what_rank.py:smoke"])
    earlier = read_config(["--config=experiments/what_rank.py:smoke"])
    assert by_name == by_path == earlier
    assert configs.find_config("paper/e2e_gpt2").name == "e2e_gpt2.py"
    with pytest.raises(RequestError, match="'what_rnk' does not exist; nearest: 'what_rank'"):
        configs.find_config("what_rnk")


def test_init_writes_a_config_that_is_read_and_overwrites_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["init", "ours.py"]) == 0
    assert read_config(["--config=ours.py:smoke"]).model.name == "tiny-bert"
    assert "mine.py" not in Path("ours.py").read_text()
    for name in ("what_rank", "paper/e2e_gpt2"):
        assert main(["init", "copy.py", f"--like={name}"]) == 0
        assert read_config(["--config=copy.py"]) == read_config([f"--config={name}"])
        Path("copy.py").unlink()
    assert main(["init", "copy.py", "--like=what_rnk"]) == 2
    assert "nearest: 'what_rank'" in capsys.readouterr().err
    before = Path("ours.py").read_text()
    for file, said in {
        "ours.py": "exists", "ours": "no Python file", "no/folder.py": "does not exist",
    }.items():  # fmt: skip
        assert main(["init", file]) == 2
        assert said in capsys.readouterr().err
    assert Path("ours.py").read_text() == before
    with pytest.raises(SystemExit):
        main(["init", "--help"])
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", shown, re.M) for name in configs.shipped_configs())
