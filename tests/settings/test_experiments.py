"""The configs of experiments/ complete to what they were when each spelled out all its settings."""

import hashlib
import json
from pathlib import Path

import pytest

from lora_jax.cli.main import main
from lora_jax.cli.requests import read_config
from lora_jax.settings import plain_config
from lora_jax.settings.config import run_file, shipped_configs
from lora_jax.sweeps.cells import read_sweep

ROOT = Path(__file__).parents[2]
# {"FILE:ARGUMENT": a digest of the completed config, "FILE:ARGUMENT SWEEP": of all its cells'}.
# The second edition's: their committed cells hold them.
SECOND = {
    *("what_rank_2", "low_data_2", "batch_size_2", "what_rank_e2e_2", "collapse", "rounding"),
}
BEFORE = json.loads((Path(__file__).parent / "experiments.json").read_text())


def digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def file_of(name):
    return next(ROOT.glob(f"experiments/configs/**/{name}.py"))


@pytest.mark.parametrize("name", sorted({key.partition(":")[0] for key in BEFORE}))
def test_a_config_completes_to_what_it_was_at_every_argument_and_in_every_sweep(name):
    path = file_of(name)
    for key in (key for key in BEFORE if key.partition(":")[0] == name):
        argument, _, sweep = key.removeprefix(f"{name}:").partition(" ")
        config = read_config([f"--config={path}:{argument}" if argument else f"--config={path}"])
        found = plain_config(config)
        if sweep:
            made = read_sweep(str(path), sweep, config)
            cells = [*made.cells, *(cell for one in made.tunings for cell in one.possible)]
            found = {cell.name: plain_config(cell.config) for cell in cells}
        assert digest(found) == BEFORE[key], key


def test_every_config_and_sweep_is_compared():
    configs = list(shipped_configs().values())
    compared = {key.partition(":")[0] for key in BEFORE}
    assert {path.stem for path in configs} - {"forkme"} - SECOND == compared
    for path in configs:
        sweeps = {name[6:] for name in run_file(path) if name.startswith("sweep_")}
        compared = {key.partition(" ")[2] for key in BEFORE if key.startswith(f"{path.stem}:")}
        assert sweeps <= compared or path.stem in {"forkme", *SECOND}


def test_the_config_to_copy_trains_and_sweeps(tmp_path, capsys):
    config = f"--config={file_of('forkme')}:smoke"
    args = [config, f"--workdir={tmp_path}", "--no-progress", "--json"]
    assert main(["train", *args, "--config.data.eval_limit=32"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["steps"] == 4
    sweep = read_sweep(str(file_of("forkme")), "rank", read_config([config]))
    assert len(sweep.first) == 6
