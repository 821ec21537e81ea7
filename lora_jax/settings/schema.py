"""The settings of a run: one frozen dataclass a section, and `Settings`, all of them together.

A method's own settings (rank, LoRA+'s ratio) are fields of its class and join by `join_method`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, NamedTuple

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.settings.fields import (
    BOOKKEEPING,
    LANE,
    Setting,
    check_range,
    optional,
    setting,
    setting_of,
)

# Sources that are files of the user's, whose columns `data.text` and `data.label` name.
TABLES = ("jsonl", "csv", "tsv", "parquet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Section:
    """What the sections share: `section["name"]`, `section.get("name")`, `dict(section)`."""

    NAME: ClassVar[str]

    def __getitem__(self, name: str) -> Any:
        if name in self.keys():
            return getattr(self, name)
        raise KeyError(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self.keys() else default

    def keys(self) -> list[str]:
        """The names of its settings."""
        return [field.name for field in dataclasses.fields(self)]

    def check(self) -> None:
        """Raises `RequestError` for a value of another type or out of range."""
        for name, value in dict(self).items():
            if value is not None:
                check(f"{self.NAME}.{name}", value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(Section):
    """The base model and its head."""

    NAME = "model"

    name: str = setting(
        help="an embedded model, or a folder in Hugging Face's layout", required=True, kind="path",
        example="minilm",
    )  # fmt: skip
    dtype: str = setting("float32", "dtype of the frozen weights")
    head: str | None = optional(
        help="the task; a classification if not given", example="classification",
        choices=("classification", "regression", "causal-lm"),
    )  # fmt: skip
    num_labels: int | None = optional(help="classes of a classification", low=1, example=2)
    scan_layers: bool = optional(False, "layers stacked and compiled once")
    quantize: str = optional("", "nf4: the frozen base in four bits", choices=("", "nf4"))
    quantize_targets: str = optional("all-linear", "the kernels to quantize")
    double_quant: bool = optional(True, "quantize the scales too, to eight bits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings(Section):
    """Texts, how they are truncated, and their batches."""

    NAME = "data"

    source: str = setting(
        help="reviews, wordnet, e2e, glue, …, or a kind of file", required=True, example="jsonl"
    )
    path: str = setting("", "file or folder of the data", kind="path", example="texts.jsonl")
    text: str = optional("", "column of texts", example="text")
    label: str = optional("", "column of labels", example="label")
    task: str = optional("", "GLUE's task", example="sst2")
    max_length: int = setting(128, "longer texts are truncated", unit="tokens", low=1)
    buckets: tuple[int, ...] = setting((16, 32, 64, 128, 256, 512), "padded lengths", unit="tokens")
    batch_size: int = setting(32, "of a training step", unit="examples", low=1, high=2**20)
    seed: int = setting(0, "decides the shapes of batches and their order", low=0)
    limit: int = setting(0, "of the training data; 0: all", unit="examples", low=0)
    draw: int = optional(
        0, "each run trains on so many, drawn by its seed; 0: on all", unit="examples", low=0
    )
    eval_limit: int = optional(0, "of validation and test; 0: all", unit="examples", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Section):
    """AdamW, its schedule and clipping."""

    NAME = "optimizer"

    lr: float = setting(help="peak learning rate", required=True, example=1e-3, low=0, role=LANE)
    head_lr: float = optional(
        0.0,
        "peak learning rate of the parameters under head/; 0: that of the rest",
        low=0,
        role=LANE,
    )
    lr_by_path: tuple = optional(
        (), "peak learning rates of the parameters that an expression matches; the first counts",
        kind="rates", role=LANE,
    )  # fmt: skip
    schedule: str = setting("linear", "after warm-up", choices=("linear", "cosine", "constant"))
    warmup_ratio: float = setting(0.0, "warm-up as a share of all steps", low=0, high=1)
    warmup_steps: int = optional(0, "warm-up instead of warmup_ratio", unit="steps", low=0)
    weight_decay: float = setting(0.01, "AdamW's, on all trainable parameters", low=0, role=LANE)
    beta1: float = setting(0.9, "decay of Adam's first moment", low=0, below=1)
    beta2: float = setting(0.999, "decay of Adam's second moment", low=0, below=1)
    eps: float = setting(1e-8, "added to the root of the second moment", above=0)
    clip_norm: float = setting(1.0, "largest global norm of the gradients; 0: no clipping", low=0)
    moment_dtype: str = optional(
        "float32", "bfloat16: half the memory for Adam's moments", choices=("float32", "bfloat16")
    )
    offload: bool = optional(False, "Adam's moments in the host's memory (unpacked cells only)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings(Section):
    """How long to train, when to evaluate and save, and the loss."""

    NAME = "train"

    num_epochs: float = setting(0.0, "or give num_steps", unit="epochs", low=0, example=2.0)
    num_steps: int = setting(0, "or give num_epochs", unit="steps", low=0, example=1000)
    label_smoothing: float = setting(0.0, "target's share given to all classes", low=0, below=1)
    model_dropout: bool = optional(False, "use the model's own dropout, at its config's rates")
    eval_every_steps: int = setting(0, "0: four times an epoch", unit="steps", low=0)
    checkpoint_every_steps: int = setting(0, "0: at each evaluation", unit="steps", low=0)
    patience: int = setting(
        0, "stop after as many without a better loss", unit="evaluations", low=0
    )
    target_loss: float = optional(
        0.0, "stop at a validation loss of this or less; 0: never", unit="nats", low=0
    )
    eval_batch_size: int = setting(128, "of an evaluation", unit="examples", low=1, high=2**20)
    log_every_steps: int = setting(10, "of metrics", unit="steps", low=1, role=BOOKKEEPING)
    accumulate_steps: int = optional(1, "parts of a batch, one after the other", low=1)
    remat: str = optional(
        "", "what layers keep; the backward pass computes the rest again", choices=(
            "", "nothing_saveable", "dots_with_no_batch_dims_saveable", "dots_saveable",
            "everything_saveable",
        ),
    )  # fmt: skip
    loss_chunk: int = optional(0, "positions whose logits are made at once; 0: by size", low=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodSettings(Section):
    """The method by name; `own` has the settings of its class that the config names."""

    NAME = "method"
    SHARED: ClassVar = ("name", "train", "rows")

    name: str = setting(
        help="lora, dora, full, …: methods/README.md", required=True, example="lora"
    )
    train: Any = setting(help="parameters that train whole", kind="names", example="head/.*")
    rows: Mapping | None = optional(help="rows of an embedding that train", kind="rows")
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__.get("own", {})
        if name not in own:
            raise AttributeError(name)
        return own[name]

    def keys(self) -> list[str]:
        return [*self.SHARED, *self.own]


SECTION_TYPES = (ModelSettings, DataSettings, MethodSettings, OptimizerSettings, TrainSettings)
SECTIONS = tuple(kind.NAME for kind in SECTION_TYPES)
# Every setting by dotted name; `join_method` adds to it.
SETTINGS: dict[str, Setting] = {
    "seed": Setting(
        kind="whole", default=0, role=LANE, low=0, high=2**63 - 1,
        help="decides a new head, the adapters, dropout and the order of examples",
    ),
    **{
        f"{kind.NAME}.{field.name}": setting_of(field)
        for kind in SECTION_TYPES
        for field in dataclasses.fields(kind)
        if field.name != "own"
    },
}  # fmt: skip


class Joined(NamedTuple):
    """A method's own settings, and whether it moves the whole model, a new head included."""

    settings: dict[str, Setting]
    moves_all: bool


METHODS: dict[str, Joined] = {}


def join_method(name: str, fields: Iterable[dataclasses.Field], *, moves_all: bool = False) -> None:
    """Makes the fields of a method's class settings: `method.rank`, `method.ratio`, ….

    A field's `metadata` may hold `help`, `unit`, `role`, `kind` and the like, as in `Setting`.
    """
    found = {field.name: setting_of(field, recorded=False) for field in fields}
    METHODS[name] = Joined(found, moves_all)
    for key, facts in found.items():
        # The default is each method's own, so that None stands for it.
        example = facts.example or facts.default or None
        shared = dataclasses.replace(facts, default=None, example=example)
        SETTINGS.setdefault(f"method.{key}", shared)


def facts_of(key: str) -> Setting:
    """What is known of the setting `key`. Raises `RequestError` with the nearest names."""
    if key not in SETTINGS:
        raise RequestError(f"the config has no setting {key!r}; {nearest(key, SETTINGS)}")
    return SETTINGS[key]


def check(key: str, value: Any) -> Any:
    """The value of a setting, typed. Raises `RequestError` for another type or one out of range."""
    return check_range(key, value, facts_of(key))


def check_method_has(method: Any, name: str) -> None:
    """Raises `RequestError` if the method has no setting of this name, or is unknown."""
    if method not in METHODS:
        raise RequestError(f"method.name={method!r} is unknown; {nearest(str(method), METHODS)}")
    if name not in (*MethodSettings.SHARED, *METHODS[method].settings):
        near = nearest(name, METHODS[method].settings)
        raise RequestError(f"method {method!r} has no setting {name!r}; {near}")
