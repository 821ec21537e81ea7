"""What the command line makes of paths, names and settings."""

import re

import pytest

from lora_jax.cli.main import main
from lora_jax.cli.parser import Parser
from lora_jax.cli.requests import read_config
from lora_jax.core.errors import RequestError
from lora_jax.core.trees import nearest
from lora_jax.io.untrusted import printable
from lora_jax.settings.config import find_config

CONFIG = "--config=reviews_minilm"


def parser():
    made = Parser("train")
    made.add_argument("--workdir")
    made.add_argument("--out")
    return made


def test_a_tilde_is_the_home_folder_in_options_and_in_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    options = parser().parse_args(["--workdir=~/x", "--out=~"])
    assert (options.workdir, options.out) == (f"{tmp_path}/x", str(tmp_path))
    config = read_config([CONFIG, "--config.data.path=~/texts.jsonl", "--config.model.name=~/m"])
    assert config.data.path == f"{tmp_path}/texts.jsonl"
    assert config.model.name == f"{tmp_path}/m"
    (tmp_path / "mine.py").write_text(find_config("reviews_minilm").read_text())
    assert read_config(["--config=~/mine.py"]).to_dict() == read_config([CONFIG]).to_dict()


def test_a_windows_path_is_refused_elsewhere_with_its_text():
    with pytest.raises(RequestError, match=re.escape(repr("C:\\runs\\first"))):
        parser().parse_args(["--workdir=C:\\runs\\first"])


@pytest.mark.parametrize(
    "word, here",
    [
        ("optimizer.learning_rate", "optimizer.lr"),
        ("method.target_modules", "method.targets"),
        ("method.modules_to_save", "method.train"),
        ("method.lora_alpha", "method.alpha"),
        ("method.r", "method.rank"),
        ("method.lora_dropout", "method.dropout"),
        ("train.num_train_epochs", "train.num_epochs"),
        ("learning_rate", "optimizer.lr"),
    ],
)
def test_a_setting_by_its_name_elsewhere_is_answered_with_its_name_here(word, here):
    with pytest.raises(RequestError, match=f"nearest: '{here}'"):
        read_config([CONFIG, f"--config.{word}=1"])


def test_nearest_of_other_words_is_by_spelling():
    assert nearest("rnak", ["alpha", "rank"]) == "nearest: 'rank', 'alpha'"


def test_escape_codes_do_not_reach_the_terminal():
    assert printable("a\x1b[31mb\x9b\x07\n\tc") == "a[31mb\n\tc"


def test_a_bad_request_is_one_line(capsys):
    assert main(["train", CONFIG, "--workdir=C:\\x"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_methods_own_setting_is_a_flag_though_the_config_does_not_list_it():
    name = "--config.method.name="
    config = read_config([CONFIG, f"{name}lora_plus", "--config.method.ratio=8"])
    assert config.method.ratio == 8
    assert read_config([CONFIG, f"{name}vera", "--config.method.projection_seed=3"]).method[
        "projection_seed"
    ] == 3  # fmt: skip
    with pytest.raises(RequestError, match="method 'lora' has no setting 'projection_seed'"):
        read_config([CONFIG, f"{name}lora", "--config.method.projection_seed=3"])


def test_an_import_error_in_a_config_is_one_line_with_its_place(tmp_path):
    (tmp_path / "broken.py").write_text("\nimport no_such_module_here\n")
    with pytest.raises(RequestError, match=r"broken\.py:2: No module named 'no_such_module_here'"):
        read_config([f"--config={tmp_path / 'broken.py'}"])


def config_with(folder, line, name="mine.py"):
    """A config file: that of the reviews, and a line that changes it."""
    text = find_config("reviews_minilm").read_text()
    text = text.replace("def get_config(", "def _get_config(")
    last = f"\n\ndef get_config(arg=''):\n  config = _get_config()\n  {line}\n  return config\n"
    (folder / name).write_text(text + last)
    return f"--config={folder / name}"


@pytest.mark.parametrize("key, text", [("lr", "'1e-3'"), ("weight_decay", "(1,)")])
def test_a_number_of_another_type_is_named_with_what_is_wanted(tmp_path, key, text):
    line = f"config.optimizer = dict(config.optimizer) | {{'{key}': {text}}}"
    with pytest.raises(RequestError, match=re.escape(f"optimizer.{key}={text} must be a number")):
        read_config([config_with(tmp_path, line)])


def test_a_batch_of_a_billion_is_refused():
    with pytest.raises(RequestError, match="train.eval_batch_size=1000000000 must be .* at most"):
        read_config([CONFIG, "--config.train.eval_batch_size=1000000000"])


def test_a_config_may_import_a_file_beside_it(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("SEED = 7\n")
    line = "import neighbour_of_mine; config.seed = neighbour_of_mine.SEED"
    assert read_config([config_with(tmp_path, line)]).seed == 7


def test_a_size_alone_is_answered_with_the_argument_that_has_it():
    with pytest.raises(RequestError, match="did you mean 'lora,smoke'?"):
        read_config([CONFIG + ":smoke"])


def test_a_misspelt_option_is_named_rather_than_what_it_leaves_missing():
    for command in ("train", "sweep", "merge"):
        made = Parser(command)
        made.add_argument("--workdir", required=True)
        with pytest.raises(RequestError, match=r"unknown argument '--workdr'; nearest: '--workdir"):
            made.parse_args(["--workdr=y"])


def test_a_regular_expression_that_looks_like_a_drive_is_no_path():
    config = read_config([CONFIG, r"--config.method.targets=a:\w+/kernel"])
    assert config.method.targets == r"a:\w+/kernel"
