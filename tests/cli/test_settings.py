"""The settings of configs: omitted ones have defaults, and each has its type."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from lora_jax.cli.main import main
from lora_jax.cli.requests import read_config
from lora_jax.core.errors import RequestError
from lora_jax.methods.registry import all_settings
from lora_jax.settings import SETTINGS, Settings, complete, flat_config, plain_config
from lora_jax.settings.config import run_file, shipped_configs

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
FILES = list(shipped_configs().values())
CARDS = sorted(EXPERIMENTS.glob("results/**/card.json"))
SMALL = """\
from ml_collections import ConfigDict
import numpy as np

def get_config():
    config = ConfigDict()
    config.model = dict(name="tiny-bert", num_labels=2)
    config.data = dict(source="reviews", limit=64)
    config.method = dict(name="lora", targets=["q", "v"])
    config.optimizer = dict(lr=1e-3)
    config.train = dict(num_steps=2)
    {line}
    return config
"""
WRONG = ("x", ["x"], ("x",), None, 0.5, 1, True, np.float32(0.5), np.int64(1), np.bool_(True), [1])
# For each kind of setting, which of WRONG it takes: by place, since 1 == True.
TAKEN = {
    "text": {0},
    "path": {0},
    "names": {0, 1, 2},
    "whole": {5, 8},
    "wholes": {5, 8, 10},
    "number": {4, 5, 7, 8},
    "flag": {6, 9},
    "rules": {1, 2, 10},  # what is in them is the method's to refuse
    "rows": set(),
    "rates": set(),
}


def small(folder, line="pass"):
    (folder / "small.py").write_text(SMALL.replace("{line}", line))
    return f"--config={folder / 'small.py'}"


def experiment(file):
    return run_file(file)["get_config"]()


def test_every_setting_of_every_experiment_refuses_values_of_another_type_in_one_line():
    known = {key for file in FILES for key in flat_config(experiment(file).to_dict())}
    assert known <= SETTINGS.keys() and len(known) > 30
    config = experiment(FILES[0]).to_dict()
    for key, setting in SETTINGS.items():
        section, _, name = key.rpartition(".")
        for place, value in enumerate(WRONG):
            changed = {**config, **({section: {**config[section], name: value}} if section else {})}
            if not section:
                changed[name] = value
            if place in TAKEN[setting.kind] or (value is None and setting.may_be_none):
                plain_config(Settings.from_config(changed))  # of JSON's types
                continue
            with pytest.raises(RequestError) as caught:
                Settings.from_config(changed)
            message = str(caught.value)
            assert message.startswith(f"{key}={value!r} must be "), message
            assert ", such as " in message and "\n" not in message


def test_every_setting_of_every_method_has_a_type():
    assert {f"method.{name}" for name in all_settings()} <= SETTINGS.keys()


def test_complete_configs_keep_their_hashes():
    assert len(CARDS) > 100
    for path in CARDS:
        card = json.loads(path.read_text())
        found = complete(card["config"])
        found.check()
        assert found.hash == card["config_hash"] and plain_config(found) == card["config"], path
        assert Settings.from_config(plain_config(found)).hash == found.hash


def test_a_small_config_has_the_defaults_of_what_it_omits(tmp_path):
    config = read_config([small(tmp_path), "--config.optimizer.warmup_steps=1"])
    assert (config.seed, config.data.batch_size, config.optimizer.beta1) == (0, 32, 0.9)
    assert config.method.targets == ("q", "v")
    assert config.method.train == "head/.*"  # a new head that does not train says nothing
    assert config.optimizer.warmup_steps == 1
    assert complete(config.to_dict()) == config


def test_a_small_config_trains(tmp_path, capsys):
    args = [small(tmp_path), f"--workdir={tmp_path / 'w'}", "--no-progress", "--json"]
    smaller = ["--config.data.limit=32", "--config.data.eval_limit=32"]
    assert main(["train", *args, *smaller, "--config.train.num_steps=1e0"]) == 0
    card = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert card["config"]["train"]["num_steps"] == 1 and card["config"]["seed"] == 0


@pytest.mark.parametrize(
    "line, words",
    [
        ("del config.optimizer", "the config lacks optimizer.lr (such as 0.001)"),
        ("del config.train", "the config lacks train.num_epochs or train.num_steps"),
        ("del config.model; del config.data", "lacks model.name (such as 'minilm'), data.source"),
        (
            "config = dict(config, optimizer=3); config = ConfigDict(config)",
            "optimizer=3 must be a section of settings",
        ),
        ("config.train.num_step = 3", "the config has no setting 'train.num_step'; nearest: 'tra"),
        (
            "config.optimizer = dict(config.optimizer) | dict(lr='1e-3')",
            "optimizer.lr='1e-3' must be a number, such as 0.001",
        ),
        ("config.optimizer.lr = '1e-3'", "small.py:11: TypeError: Could not override field 'lr'"),
        ("config.method.rank = [8]", "method.rank=[8] must be a whole number, such as 8"),
        ("raise TypeError('no such thing')", "small.py:11: TypeError: no such thing"),
        ("raise ValueError('no size:\\nsmoke')", "small.py:11: no size: smoke"),
        ("return None", "returns None; return an ml_collections.ConfigDict"),
    ],
)
def test_what_is_wrong_in_a_config_is_one_line(tmp_path, capsys, line, words):
    assert main(["train", small(tmp_path, line), f"--workdir={tmp_path / 'w'}"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and said.startswith("lora-jax: ")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    "flag, found",
    [
        ("train.num_steps=1e1", 10),
        ("train.num_steps=12", 12),
        ("optimizer.lr=1", 1.0),
        ("data.buckets=(8, 16)", (8, 16)),
        ("data.buckets=8,16", (8, 16)),
        ("method.targets=('q', 'v')", ("q", "v")),
        ("method.targets=(q|v).*", "(q|v).*"),
        ("method.layers=0,1", (0, 1)),
        ("model.scan_layers=true", True),
        ("data.text=0", "0"),
    ],
)
def test_a_flag_has_the_type_of_its_setting(tmp_path, flag, found):
    value = flat_config(read_config([small(tmp_path), f"--config.{flag}"]).to_dict())
    value = value[flag.partition("=")[0]]
    assert value == found and type(value) is type(found)


@pytest.mark.parametrize(
    "flag", ["train.num_steps=1.5", "train.num_steps=ten", "optimizer.lr=fast", "data.buckets=x"]
)
def test_a_flag_of_another_type_names_setting_value_and_type(tmp_path, flag):
    key, _, text = flag.partition("=")
    with pytest.raises(RequestError, match=rf"{key}='?{text}'? must be a .*, such as "):
        read_config([small(tmp_path), f"--config.{flag}"])


def test_an_override_reaches_what_refers_to_it_and_settings_of_the_users_own(tmp_path):
    line = (
        "config.train.patience = config.train.get_ref('num_steps'); "
        "config.notes = ConfigDict(dict(place='here'))"
    )
    args = [small(tmp_path, line), "--config.train.num_steps=7", "--config.notes.place=there"]
    config = read_config(args)
    assert (config.train.patience, config.to_dict()["notes"]) == (7, {"place": "there"})


def test_a_plain_mapping_is_a_config():
    assert complete(_plain()) == complete(ConfigDict(_plain()))


def _plain():
    return {
        "model": {"name": "tiny-bert"},
        "data": {"source": "reviews"},
        "method": {"name": "lora", "targets": "q"},
        "optimizer": {"lr": np.float32(0.5)},
        "train": {"num_steps": np.int64(2)},
    }
