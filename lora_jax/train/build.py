"""From a config to everything a run needs: model, method, batches, optimizer, programs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, SingleDeviceSharding

from lora_jax.core.draws import key_from_seed, partitionable
from lora_jax.core.errors import RequestError
from lora_jax.data import (
    EncodedExamples,
    EvalBatches,
    Splits,
    TrainIterator,
    bucket_lengths,
    eval_batches,
    load_splits,
    train_batches,
)
from lora_jax.data.schedule import drawn_rows
from lora_jax.io import matching  # noqa: F401  (rules then match within a time limit)
from lora_jax.methods import Method
from lora_jax.methods.registry import method_of
from lora_jax.models import Model, load_model
from lora_jax.models.load import redraw_head
from lora_jax.parallel.offload import HOST, lacks_host_memory, offload
from lora_jax.parallel.placement import Placement, place
from lora_jax.settings import (
    SETTINGS,
    MethodSettings,
    ModelSettings,
    Settings,
    TrainSettings,
    check,
)
from lora_jax.train.cell import Schedule
from lora_jax.train.compilation import CompiledByShape
from lora_jax.train.evaluate import make_scores
from lora_jax.train.loss import loss_settings, make_loss
from lora_jax.train.optimizer import make_optimizer, optimizer_parts
from lora_jax.train.state import TrainState, init_state
from lora_jax.train.step import check_accumulate, make_train_step
from lora_jax.train.task import Task, head_of, task_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What stays the same during a run. `frozen` is the part of the model that no step changes;
    `note` is for the user: what was asked for and is not to be had here."""

    model: Model
    method: Method
    task: Task
    frozen: Any
    splits: Splits
    batches: TrainIterator
    validation: EvalBatches
    test: EvalBatches
    schedule: Schedule
    step: CompiledByShape
    scores: CompiledByShape
    placement: Placement | None
    note: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """A model and the data for it, loaded and encoded once for any number of cells; on a mesh
    where there is a `placement`."""

    model: Model
    task: Task
    splits: Splits
    encoded: Mapping[str, EncodedExamples]
    buckets: tuple[int, ...]
    placement: Placement | None = None
    _models: dict[int, Model] = dataclasses.field(default_factory=dict, repr=False)

    def model_of(self, seed: int) -> Model:
        """The model as a run of this seed begins with it: the base shared, a new head its own."""
        if seed not in self._models:
            self._models[seed] = redraw_head(self.model, keys_of(seed)[0])
        return self._models[seed]

    def train_batches_of(self, config: Settings) -> TrainIterator:
        """The training batches of one run: of all examples, or of those its seed draws.

        Raises `RequestError` for a draw of more than there are, or of texts in several buckets.
        """
        examples, num_drawn = self.encoded["train"], config.data.draw
        if num_drawn:
            if len(self.buckets) > 1:
                raise RequestError(
                    f"data.draw={num_drawn} needs one padded length, so that runs of other draws "
                    f"have batches of one shape; set data.buckets=({config.data.max_length},)"
                )
            examples = examples.take(drawn_rows(len(examples), num_drawn, seed=config.seed))
        return train_batches(
            examples,
            batch_size=config.data.batch_size,
            buckets=self.buckets,
            seed=config.data.seed,
            order_seed=config.seed,
        )

    def eval_batches_of(self, config: Settings) -> tuple[EvalBatches, EvalBatches]:
        """Those of validation and of test."""
        size = config.train.eval_batch_size
        validation, test = (
            eval_batches(self.encoded[name], batch_size=size, buckets=self.buckets)
            for name in ("validation", "test")
        )
        return validation, test


def load_base(config: Settings, mesh: Mesh | None = None) -> Base:
    """Loads what the `model` and `data` sections of `config` name, the model onto `mesh` if there
    is one. Raises `RequestError`."""
    config.model.check()
    config.data.check()  # the rest is each cell's own
    splits = load_splits(config.data, target=task_of(config.model).target)
    task = task_of(config.model, splits)
    model = make_model(config.model, keys_of(config.seed)[0], mesh)
    encoded = {
        name: task.encode(model, getattr(splits, name), max_length=config.data.max_length)
        for name in ("train", "validation", "test")
    }
    buckets = bucket_lengths(config.data.buckets, config.data.max_length)
    return Base(
        model=model, task=task, splits=splits, encoded=encoded, buckets=buckets,
        placement=None if mesh is None else Placement(mesh, model),
    )  # fmt: skip


def build(
    config: Settings, base: Base | None = None, mesh: Mesh | None = None
) -> tuple[Setup, TrainState]:
    """Loads and prepares all that `config` names, and the state before the first step.

    `config.seed` decides the new head, the adapters, dropout and which examples meet in a batch;
    `config.data.seed` the shapes of the batches and their order. `base` is what `load_base` gave
    for the same model and data, where they are loaded already; else `mesh` is for it. Raises
    `RequestError`.
    """
    config.check()
    _, init_key, run_key = keys_of(config.seed)
    base = base or load_base(config, mesh)
    accumulate = accumulate_of(config)
    placement = base.placement and base.placement.alone(config.data.batch_size, accumulate)
    if placement is not None:
        placement.check_batch(config.data.batch_size, accumulate)
    model = base.model_of(config.seed)
    method = make_method(config.method, model)
    batches = base.train_batches_of(config)
    schedule = plan_steps(config.train, batches.steps_per_epoch)
    constrain = placement and placement.constrain
    loss = make_loss(
        model.apply, method, task=base.task, constrain=constrain, **loss_settings(config.train)
    )
    trainable, frozen = method.init(init_key, model.params)
    if not trainable:
        raise RequestError(f"method.name={config.method.name!r} trains nothing in this model")
    tx, of_state, note = _optimizer(config, method, trainable, schedule.num_steps, placement)
    initial = functools.partial(init_state, tx=tx)
    if of_state is not None:
        initial = jax.jit(initial, out_shardings=of_state)
    state = initial(trainable, key=run_key)
    if placement is not None:
        frozen = place(frozen, placement.params(frozen))
    put = placement and placement.place_batch
    step = make_train_step(
        loss, tx, accumulate=accumulate, out_shardings=of_state and (of_state, None)
    )
    scores = make_scores(model.apply, method, task=base.task, constrain=constrain)
    validation, test = base.eval_batches_of(config)
    setup = Setup(
        model=model, method=method, task=base.task, frozen=frozen, splits=base.splits,
        batches=batches, validation=validation, test=test, schedule=schedule,
        step=CompiledByShape(step, put), scores=CompiledByShape(scores, put),
        placement=placement, note=note,
    )  # fmt: skip
    return setup, state


def _optimizer(config: Settings, method: Method, trainable: Any, num_steps: int, placement: Any):
    """`(tx, shardings of the state or None, what to tell the user)`."""

    def shapes_of(tx) -> TrainState:
        initial = functools.partial(init_state, tx=tx)
        return jax.eval_shape(initial, trainable, key=jax.eval_shape(lambda: key_from_seed(0)))

    def shardings_of(shapes: TrainState) -> TrainState:
        if placement is not None:
            return placement.state(method, shapes)
        return jax.tree.map(lambda x: SingleDeviceSharding(jax.devices()[0]), shapes)

    if not config.optimizer.offload:
        tx = method.optimizer(make_optimizer(config.optimizer, num_steps))
        return tx, None if placement is None else shardings_of(shapes_of(tx)), ""
    lacks = lacks_host_memory(jax.devices()[0])
    parts = optimizer_parts(config.optimizer, num_steps)
    kind = None if lacks else HOST
    tx, of_state = offload(parts, method.optimizer, shapes_of, shardings_of, kind=kind)
    note = f"optimizer.offload: {lacks}; the moments stay on the device" if lacks else ""
    return tx, of_state, note


@partitionable()
def keys_of(seed: int) -> jax.Array:
    """The three keys of a run, from its seed: for a new head, the adapters, and the steps."""
    check("seed", seed)
    return jax.random.split(key_from_seed(seed), 3)


def make_model(settings: ModelSettings, head_key: jax.Array, mesh: Mesh | None = None) -> Model:
    """The model that the settings name, with the head they ask for; on `mesh` where there is one.

    Raises `RequestError` if the model has none of that kind.
    """
    head = head_of(settings)
    options = {"dtype": settings.dtype, **_quantized(settings)}
    if mesh is not None:
        options["sharding_of"] = Placement(mesh).leaf
    if head != "causal-lm":
        options |= {"num_labels": settings.num_labels, "head_key": head_key}
        return load_model(settings.name, head=head, **options)
    model = load_model(settings.name, scan_layers=settings.scan_layers, **options)
    if model.kind != "causal-lm" or model.eos_token_id is None:
        lacks = f"is an {model.kind}" if model.kind != "causal-lm" else "has no end of text"
        raise RequestError(
            f"model.head=causal-lm, but {settings.name!r} {lacks}; name a causal language model, "
            "such as tiny-llama or smollm2-135m"
        )
    return model


def accumulate_of(config: Settings) -> int:
    """Into how many parts a step cuts its batch. Raises `RequestError` if they do not divide it."""
    return check_accumulate(config.train.accumulate_steps, config.data.batch_size)


def _quantized(settings: ModelSettings) -> dict[str, Any]:
    """Arguments of `load_model` for four bits; none where model.quantize is ""."""
    names = ("quantize", "quantize_targets", "double_quant")
    found = {name: settings[name] for name in names}
    if found["quantize"]:
        return found
    for name in names[1:]:
        if found[name] != SETTINGS[f"model.{name}"].default:
            raise RequestError(
                f"model.{name}={found[name]!r} means nothing without model.quantize='nf4'"
            )
    return {}


def make_method(settings: MethodSettings, model: Model) -> Method:
    """The method that the config's `method` section names, for the parameters of `model`.

    Raises `RequestError` for an unknown name or values the method refuses.
    """
    return method_of(settings.name, dict(settings), axes=model.axes, aliases=model.aliases)


def plan_steps(settings: TrainSettings, steps_per_epoch: int) -> Schedule:
    """How long, how often to evaluate, save and log, and the patience, from the `train` section."""
    settings.check()
    if not settings.num_steps and not settings.num_epochs:
        raise RequestError("train.num_epochs=0 must be above 0 where train.num_steps is 0")
    eval_every = settings.eval_every_steps or max(1, steps_per_epoch // 4)
    return Schedule(
        num_steps=settings.num_steps or math.ceil(settings.num_epochs * steps_per_epoch),
        eval_every=eval_every,
        checkpoint_every=settings.checkpoint_every_steps or eval_every,
        log_every=settings.log_every_steps,
        patience=settings.patience,
        target_loss=settings.target_loss,
    )
