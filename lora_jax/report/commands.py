"""The command that trains a run again, with the config that its settings are settings of."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.report.groups import flatten
from lora_jax.report.runs import FinishedRun, Run
from lora_jax.settings import Settings, config_hash
from lora_jax.settings.config import run_file

# The configs of this project's own checkout. No other file is executed: a card may be a stranger's.
EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"


def command(run: Run, *, workdir: str = "runs/again") -> str | None:
    """A shell command that trains the cell again, with every setting spelled out.

    None where the card names no config file and no config of this project has these settings.
    """
    source = config_of(run)
    return None if source is None else train_command(source, run.name, run.config, workdir)


def train_command(source: str, name: str, config: Mapping[str, Any], workdir: str) -> str:
    """The shell command that trains `config`, whose file is `source` ("FILE.py[:arg]").

    >>> print(train_command("my.py:lora", "r8", {"seed": 1, "data": {"path": "my file"}}, "runs"))
    lora-jax train --config=my.py:lora --name=r8 --workdir=runs \\
      '--config.data.path=my file' \\
      --config.seed=1
    """
    first = [f"--config={source}", f"--name={name}", f"--workdir={workdir}"]
    settings = sorted(flatten(config).items())
    lines = [shlex.join(["lora-jax", "train", *first])]
    lines += [shlex.quote(f"--config.{key}={value}") for key, value in settings]
    return " \\\n  ".join(lines)


def config_of(run: Run) -> str | None:
    """The config as `--config=` takes it: the card's own, or the one that has these settings."""
    if isinstance(run, FinishedRun) and run.card.config_name:
        return run.card.config_name
    folders = set(run.folder.resolve().parts)
    # Configs with the same settings are many: the folder's name tells which one was meant.
    files = sorted(
        EXPERIMENTS.glob("*.py"),
        key=lambda file: (file.stem not in folders, file.stem != "reviews_minilm", file.stem),
    )
    return next((f"experiments/{file.name}" for file in files if _makes(file, run.config)), None)


def _makes(file: Path, settings: dict) -> bool:
    """Whether the file's config, with these settings put in, is a config of the same hash."""
    config = _config(file)
    try:
        made = None if config is None else config.replace(flatten(settings))
    except (RequestError, ValueError, TypeError, KeyError):
        return False
    return made is not None and made.hash == config_hash(settings)


@functools.cache
def _config(file: Path) -> Settings | None:
    if "def get_config" not in file.read_text(encoding="utf-8"):
        return None
    try:
        make = run_file(file)["get_config"]
        takes = inspect.signature(make).parameters.values()
        config = make("") if any(one.default is one.empty for one in takes) else make()
        return Settings.from_config(config)
    except Exception:  # a config that cannot be read here is none that made the run
        return None
