"""What a run left, put back onto its base."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lora_jax.core.draws import partitionable
from lora_jax.core.errors import RequestError
from lora_jax.io.paths import at_home
from lora_jax.io.run_adapter import DESCRIPTION, TENSORS, load_trainable
from lora_jax.io.untrusted import COUNT, check_fields
from lora_jax.methods import Method
from lora_jax.models import Model
from lora_jax.models.load import redraw_head
from lora_jax.models.save import label_fields
from lora_jax.train.build import keys_of, make_method, make_model
from lora_jax.train.record import Card
from lora_jax.train.task import head_of
from lora_jax.train.workdir import config_from
from lora_jax.train.write_results import hash_trainable


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A model with what a run trained for it: `method.bind(trainable, frozen)` is its params."""

    model: Model
    method: Method
    trainable: Any
    frozen: Any
    description: dict[str, Any]

    @property
    def params(self) -> Any:
        """The model's parameters with the adapter bound, for `model.apply`."""
        return self.method.bind(self.trainable, self.frozen)

    @property
    def merged(self) -> tuple[dict[str, Any], Any]:
        """`(trainable, frozen)` that bind to the plain model with the adapter folded in."""
        return {}, self.method.merge(self.trainable, self.frozen, dtype="stored")


@partitionable()
def load_run_adapter(
    folder: str | os.PathLike, mesh: Mesh | None = None, *, model: Model | None = None
) -> Adapted:
    """A finished run's `adapter/` folder with its base model, ready to bind, merge or evaluate.

    `model` is its base where that is loaded already; else it is loaded, onto `mesh` if there is
    one.

    Raises `RequestError` if the folder is damaged or the base model's weights are not those it was
    trained on.
    """
    folder = at_home(folder)
    trainable, description = load_trainable(folder)
    check_fields(description, _DESCRIBED, f"{folder}/{DESCRIPTION}", _COPY)
    _check_against_card(folder, trainable, description)
    sections = {name: description[name] for name in ("model", "method")}
    config = config_from(sections, f"{folder}/{DESCRIPTION}")
    head_key, init_key, _ = keys_of(description["seed"])
    if model is None:
        model = make_model(config.model, head_key, mesh)
    else:
        _check_base(model, config.model, folder)
        model = redraw_head(model, head_key)
    if model.base_hash != (base_hash := description["base_hash"]):
        raise RequestError(
            f"the adapter in {folder} was trained on other weights than {config.model.name!r} has "
            f"(base hash {base_hash[:12]}, here {model.base_hash[:12]}); load the model it was "
            "trained on"
        )
    method = make_method(config.method, model)
    wanted, frozen = method.init(init_key, model.params)
    there, here = (
        jax.tree.map(lambda x: (str(x.dtype), *x.shape), tree) for tree in (trainable, wanted)
    )
    if there != here:
        raise RequestError(
            f"the tensors in {folder} are not those of its method.json; copy it again"
        )
    _check_drawn(method.drawn(trainable), description.get("drawn", {}), folder)
    return Adapted(_with_labels(model, description), method, trainable, frozen, description)


def _check_base(model: Model, settings: Any, folder: Path) -> None:
    """Raises `RequestError` unless `model` has the head and the layers of the run's model."""
    head = head_of(settings)
    head, count = None if head == "causal-lm" else head, settings.get("num_labels")
    if model.head != head or count not in (None, model.num_labels):
        raise RequestError(
            f"the run in {folder} has head={head!r}, num_labels={count}, and the model given has "
            f"head={model.head!r}, num_labels={model.num_labels}; load it with those"
        )
    stacked = bool(getattr(model.config, "scan_layers", False))
    if stacked != bool(settings.get("scan_layers", False)):
        raise RequestError(
            f"the run in {folder} was trained with scan_layers={not stacked}; load the model so, "
            "or convert the adapter to PEFT's format first (lora-jax convert)"
        )


def _with_labels(model: Model, description: dict[str, Any]) -> Model:
    """The model with the names of the run's classes, which its exports keep."""
    names = description.get("label_names")
    if model.head != "classification" or not isinstance(names, list):
        return model
    if len(names) != model.num_labels or not all(isinstance(name, str) for name in names):
        return model
    return dataclasses.replace(model, labels=label_fields(names))


def _check_drawn(here: dict[str, list[float]], there: Any, folder: str | os.PathLike) -> None:
    """Raises `RequestError` where this JAX draws other numbers than the adapter was trained with.

    Folders from before the sample was kept have none; nothing is compared then.
    """
    for name, row in there.items() if isinstance(there, dict) else ():
        # A tolerance: devices round the same draw differently in the last bit.
        if len(row) != len(here.get(name, ())) or not np.allclose(row, here[name], 1e-4, 1e-5):
            raise RequestError(
                f"the adapter in {folder} was trained with other random numbers {name} than JAX "
                f"{jax.__version__} draws here; use the JAX version that its card.json names"
            )


def _check_against_card(folder: Path, trainable: Any, description: Mapping[str, Any]) -> None:
    """Raises `RequestError` if the run's card, next to the folder, is of other weights, or of
    another model, method, seed or data than the folder's description."""
    path = folder.resolve().parent / "card.json"
    if folder.resolve().name != "adapter" or not path.exists():
        return
    card = Card.read(path)
    wanted = card.metrics.weights_sha256
    if wanted is not None and wanted != (found := hash_trainable(trainable)):
        raise RequestError(
            f"the weights in {folder}/{TENSORS} are not those that {path} names "
            f"(weights_sha256 {wanted[:12]!r}, here {found[:12]!r}): one of the files was "
            "changed or damaged; copy the run again"
        )
    said = {**card.config, "base_hash": card.base_hash, "data_hash": card.data_hash}
    for name in ("model", "method", "seed", "base_hash", "data_hash"):
        if name in said and said[name] != description.get(name):
            raise RequestError(
                f"{folder}/{DESCRIPTION} and {path} have different {name}: one of the files was "
                "changed; copy the run again"
            )


_DESCRIBED = {
    "model": dict, "model.name": str, "method": dict, "method.name": str, "seed": COUNT,
    "base_hash": str, "?drawn": dict,
}  # fmt: skip
_COPY = "copy the folder again, or train this cell again"
