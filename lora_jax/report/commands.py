"""The command that trains a run again, with the config that its settings are settings of."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Mapping
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.report.runs import FinishedRun, Run
from lora_jax.settings import Settings, config_hash
from lora_jax.settings.config import run_file, shipped_configs
from lora_jax.settings.settings import hashable_settings


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
    settings = sorted(hashable_settings(config).items())
    lines = [shlex.join(["lora-jax", "train", *first])]
    lines += [shlex.quote(f"--config.{key}={value}") for key, value in settings]
    return " \\\n  ".join(lines)


def config_of(run: Run) -> str | None:
    """The config as `--config=` takes it: the card's own, or the one that has these settings."""
    if isinstance(run, FinishedRun) and run.card.config_name:
        return run.card.config_name
    folders = set(run.folder.resolve().parts)
    # Configs with the same settings are many: the folder's name tells which one was meant.
    names = sorted(
        shipped_configs(), key=lambda name: (name not in folders, name != "reviews_minilm", name)
    )
    return next((name for name in names if "/" not in name and _makes(name, run.config)), None)


def _makes(name: str, settings: dict) -> bool:
    """Whether this config, with these settings put in, is a config of the same hash.

    Only shipped ones are executed: a card may be a stranger's.
    """
    config = _config(name)
    try:
        made = None if config is None else config.replace(hashable_settings(settings))
    except (RequestError, ValueError, TypeError, KeyError):
        return False
    return made is not None and made.hash == config_hash(settings)


@functools.cache
def _config(name: str) -> Settings | None:
    try:
        # By its path: a file of that name in the working folder is not a shipped one.
        make = run_file(shipped_configs()[name])["get_config"]
        takes = inspect.signature(make).parameters.values()
        config = make("") if any(one.default is one.empty for one in takes) else make()
        return Settings.from_config(config)
    except Exception:  # a config that cannot be read here is none that made the run
        return None
