"""Trackers by the names of `--track`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.trackers.base import Tracker
from lora_jax.trackers.mlflow_runs import MLflow
from lora_jax.trackers.trackio_runs import Trackio
from lora_jax.trackers.wandb_runs import WandB

MAKERS: dict[str, Callable[..., Any]] = {"wandb": WandB, "trackio": Trackio, "mlflow": MLflow}
NAMES = tuple(MAKERS)


def make_tracker(text: str) -> Tracker:
    """The tracker of `--track=NAME[:PROJECT]`.

    Args:
      text: a name of `NAMES`, and the project (of MLflow the experiment) after a colon; by default
        what the library's own environment variable says, or "lora_jax".

    Raises:
      RequestError: there is no such tracker, or it cannot be reached.
      ModuleNotFoundError: its library is not installed; the message names the extra.

    >>> try:
    ...     make_tracker("wand")
    ... except RequestError as error:
    ...     print(error)
    there is no tracker 'wand'; nearest: 'wandb', 'mlflow', 'trackio'
    """
    name, colon, project = text.partition(":")
    if name not in MAKERS:
        raise RequestError(f"there is no tracker {name!r}; {nearest(name, NAMES)}")
    if colon and not project:
        raise RequestError(f"--track={text} names no project; write {name}:PROJECT, or {name}")
    return MAKERS[name](project) if project else MAKERS[name]()
