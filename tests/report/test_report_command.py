"""The command that a report prints for a run, read back by the command line's own parser."""

import json
import shlex
from pathlib import Path

import pytest

from lora_jax.cli.parser import Parser
from lora_jax.report import commands
from lora_jax.report.commands import command, train_command
from lora_jax.report.runs import FinishedRun, Run
from lora_jax.settings import config_hash, plain_config
from lora_jax.settings.config import shipped_configs
from lora_jax.train.record import Card

CARDS = sorted((Path(__file__).parents[2] / "experiments" / "results").rglob("card.json"))


def parse(text):
    """The options and the config that the command line reads in a printed command."""
    words = shlex.split(text.replace("\\\n", " "))
    assert words[:2] == ["lora-jax", "train"]
    parser = Parser("train")
    parser.add_argument("--name")
    parser.add_argument("--workdir")
    return parser.parse_with_config(words[2:])


def run_of(path, **changes):
    card = Card.from_json({**json.loads(path.read_text()), **changes})
    return FinishedRun(path.parent.name, path.parent, card.config, (), card, None)


def test_every_committed_run_has_a_command_that_gives_the_config_of_its_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(CARDS) >= 130
    for path in CARDS:
        run = run_of(path)
        options, config = parse(command(run))
        assert options.name == run.name
        assert config_hash(plain_config(config)) == run.card.config_hash, path


def test_a_file_named_as_a_shipped_config_is_not_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in shipped_configs():
        if "/" not in name:
            (tmp_path / name).write_text("raise SystemExit('executed')")
    commands._config.cache_clear()
    assert command(run_of(CARDS[0])) is not None


def test_a_card_that_names_its_config_is_believed_and_its_file_not_executed(tmp_path):
    trap = tmp_path / "trap.py"
    trap.write_text("raise SystemExit('executed')")
    run = run_of(CARDS[0], config_file=f"{trap}:lora")
    assert f"--config={trap}:lora" in command(run)


def test_settings_that_no_config_has_give_no_command():
    assert command(Run("x", Path("x"), {"seed": 1, "unheard": {"of": 2}}, ())) is None


@pytest.mark.parametrize("key", ["a=1; touch x #", "b $(touch x)", "c`x`'"])
def test_no_part_of_a_setting_is_a_word_of_its_own_to_the_shell(key):
    text = train_command("m.py; touch x", "n; touch x", {key: "v; touch x"}, "runs")
    assert shlex.split(text.replace("\\\n", " ")) == [
        "lora-jax", "train", "--config=m.py; touch x", "--name=n; touch x", "--workdir=runs",
        f"--config.{key}=v; touch x",
    ]  # fmt: skip
