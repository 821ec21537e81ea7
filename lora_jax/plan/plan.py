"""A train step of any size compiled for a described TPU slice, on a machine that has none.

The step is the one that `train` runs: its model, method, loss and optimizer, with shapes in place
of arrays. XLA's TPU compiler (`libtpu`) needs no TPU; what it says of memory is what it would
reserve there. That it does not fit is an answer, too.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.core.trees import flatten
from lora_jax.methods import Method
from lora_jax.methods.registry import method_of
from lora_jax.models import Model
from lora_jax.models.families import CAUSAL_LM
from lora_jax.models.shapes import abstract_model
from lora_jax.parallel.mesh import batch_parts, make_mesh, mesh_text
from lora_jax.parallel.offload import offload
from lora_jax.parallel.placement import Placement, place
from lora_jax.plan.topology import CHIPS, SLICES, describe_topology, needed_bytes
from lora_jax.quant import quantize
from lora_jax.settings import OptimizerSettings
from lora_jax.train.compilation import compile_ahead
from lora_jax.train.loss import make_loss
from lora_jax.train.memory import num_bytes
from lora_jax.train.optimizer import make_optimizer, optimizer_parts
from lora_jax.train.state import TrainState, init_state
from lora_jax.train.step import check_accumulate, step_function
from lora_jax.train.task import TASKS, readout_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be planned. `batch` counts sequences of `length` tokens over the whole slice;
    `method` is a name with its settings, as in a config; `moments` the dtype of Adam's, which
    `offload` keeps in the hosts' memory."""

    model: str
    method: str
    topology: str
    mesh: Mapping[str, int]
    batch: int
    length: int
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "bfloat16"
    moments: str = "float32"
    remat: str = "nothing_saveable"
    quantize: str = ""
    accumulate: int = 1
    offload: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What the compiler said, bytes per device; None where the program does not fit.

    `argument_bytes`: parameters, state and batch. `temp_bytes`: what the step allocates.
    `peak_bytes`: the most at once. `host_bytes`: of the optimizer's state that was offloaded, in
    hosts' memory, and in no other of these. `limit_bytes`: what the compiler may use.
    `needed_bytes` says how much a program that does not fit wanted. `total_*` are sums over the
    slice. `flops` are of one step over the slice, analytic; `seconds_at_least` by the roofline.
    """

    request: Request
    num_devices: int
    num_params: int
    num_trainable: int
    base_bytes: int
    state_bytes: int
    argument_bytes: int | None
    temp_bytes: int | None
    peak_bytes: int | None
    host_bytes: int
    limit_bytes: int
    needed_bytes: int | None
    fits: bool
    flops: float
    seconds_at_least: float
    compile_seconds: float

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values, the request's fields first."""
        found = dataclasses.asdict(self)
        return {**found.pop("request"), **found}

    @property
    def total_argument_bytes(self) -> int | None:
        """Arguments of all devices together."""
        return None if self.argument_bytes is None else self.argument_bytes * self.num_devices


def make_plan(request: Request, show: Callable[[str], None] = lambda text: None) -> Plan:
    """Compiles the step; `show` is called when that begins. Raises `RequestError` for what cannot
    be asked for."""
    model, method = _model_and_method(request)
    devices = list(describe_topology(request.topology).devices)
    mesh = make_mesh(request.mesh, devices)
    rows = batch_parts(request.mesh)
    if request.batch % (rows * request.accumulate):
        raise RequestError(
            f"--batch={request.batch} does not divide over {rows} parts (data x fsdp) of "
            f"{request.accumulate} accumulated; give a multiple of {rows * request.accumulate}"
        )
    check_accumulate(request.accumulate, request.batch)
    placement = Placement(mesh, model)
    state, frozen, batch, tx = _abstract(request, model, method)
    of_state = placement.state(method, state)
    if request.offload:
        parts = optimizer_parts(_settings(request), NUM_STEPS)
        state_of = functools.partial(_state_of, state.trainable)
        shardings_of = functools.partial(placement.state, method)
        tx, of_state = offload(parts, method.optimizer, state_of, shardings_of)
        state = state_of(tx)
    shardings = (of_state, placement.params(frozen), placement.batch(batch))
    arguments = tuple(map(place, (state, frozen, batch), shardings))
    task = dataclasses.replace(TASKS["causal-lm"], readout=readout_tokens)
    loss = make_loss(
        model.apply, method, task=task, remat=request.remat, constrain=placement.constrain,
        loss_chunk=_chunk_of(request, model, rows),
    )  # fmt: skip
    step = jax.jit(
        step_function(loss, tx, accumulate=request.accumulate),
        donate_argnums=0,
        out_shardings=(of_state, None),
    )
    said = mesh_text(mesh) or "one chip"
    show(f"{request.model}, {request.method}, {request.topology}, {said}: compiling")
    start = time.perf_counter()
    needed = memory = None
    try:
        memory = compile_ahead(step, *arguments).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        needed = needed_bytes(str(error))
    return _described(request, model, method, mesh, arguments, memory, needed, start)


def _model_and_method(request: Request) -> tuple[Model, Method]:
    model = abstract_model(request.model, dtype=request.dtype, scan_layers=True)
    if model.kind != CAUSAL_LM:
        raise RequestError(
            f"model {model.name} is an {model.kind}; plans are of language models, such as "
            "gpt3-175b or llama-2-7b"
        )
    settings = {"targets": "q,v", "rank": 4, "alpha": 8.0, "train": "", **request.settings}
    names = {"axes": model.axes, "aliases": model.aliases}
    if request.quantize:
        quantized = functools.partial(
            quantize, targets="all-linear", format=request.quantize, **names
        )
        params = jax.eval_shape(quantized, model.params)
        model = dataclasses.replace(model, params=params)
    return model, method_of(request.method, settings, **names)


def _abstract(request: Request, model: Model, method: Method):
    """`(state, frozen, batch, tx)`, all of shapes."""
    tx = method.optimizer(make_optimizer(_settings(request), NUM_STEPS))
    key = jax.eval_shape(lambda: jax.random.key(0))
    trainable, frozen = jax.eval_shape(method.init, key, model.params)
    state = _state_of(trainable, tx)
    shape = (request.batch, request.length)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in _OF_TOKENS}
    batch["weights"] = jax.ShapeDtypeStruct(shape[:1], jnp.float32)
    return state, frozen, batch, tx


def _settings(request: Request) -> OptimizerSettings:
    return OptimizerSettings(lr=1e-4, schedule="constant", moment_dtype=request.moments)


def _state_of(trainable: Any, tx: Any) -> TrainState:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(functools.partial(init_state, tx=tx), trainable, key=key)


NUM_STEPS = 100  # of the schedule, which is a number in the program
_OF_TOKENS = ("input_ids", "attention_mask", "loss_mask")


def _chunk_of(request: Request, model: Model, rows: int) -> int:
    """Positions whose logits one device makes at a time: 64 MiB of them at most."""
    vocab = model.config.vocab_size
    batch = request.batch // rows // request.accumulate
    return max(1, min(request.length, 64 * 2**20 // (4 * batch * vocab)))


def _described(request, model, method, mesh, arguments, memory, needed, start) -> Plan:
    state, frozen, _ = arguments
    kind = request.topology.partition(":")[0]
    limit, flops_per_s, bytes_per_s = CHIPS[kind]
    flops = step_flops(
        model, method, tokens=request.batch * request.length, length=request.length,
        again=request.remat == "nothing_saveable",
    )  # fmt: skip
    argument = None if memory is None else memory.argument_size_in_bytes
    # XLA (libtpu 0.0.42) counts it in the peak, and not in what must fit into the limit.
    on_host = 0 if memory is None else memory.host_argument_size_in_bytes
    # Every argument is read at least once.
    read = (num_bytes(frozen) + num_bytes(state)) / mesh.size
    return Plan(
        request=request,
        num_devices=mesh.size,
        num_params=sum(leaf.size for leaf in flatten(model.params).leaves),
        num_trainable=method.table(model.params).num_trainable,
        base_bytes=num_bytes(frozen),
        state_bytes=num_bytes(state),
        argument_bytes=argument,
        temp_bytes=None if memory is None else memory.temp_size_in_bytes,
        peak_bytes=None if memory is None else memory.peak_memory_in_bytes - on_host,
        host_bytes=on_host,
        limit_bytes=int(limit),
        needed_bytes=needed,
        fits=memory is not None,
        flops=flops,
        seconds_at_least=max(flops / mesh.size / flops_per_s, read / bytes_per_s),
        compile_seconds=time.perf_counter() - start,
    )


def find_smallest(request: Request, kind: str, show: Callable[[str], None]) -> list[Plan]:
    """Plans of slices of `kind`, smallest first, up to the first that fits; the batch is the same.

    On each slice the meshes of `tensor` 1, 2, 4 and 8 whose `fsdp` divides the batch are tried;
    `request.topology` and `request.mesh` are ignored. `show` is called with what comes next. Raises
    `RequestError` for an unknown kind, or where no slice is large enough.
    """
    if kind not in SLICES:
        raise RequestError(f"--smallest={kind}: no such kind; {nearest(kind, SLICES)}")
    plans: list[Plan] = []
    least = arguments_at_least(request)
    for layout in SLICES[kind]:
        chips = math.prod(int(n) for n in layout.split("x"))
        if least / chips > CHIPS[kind][0]:
            show(f"{kind}:{layout}: {least / chips / 1e9:,.0f} GB of arguments a chip: too few")
            continue
        for tensor in (1, 2, 4, 8):
            fsdp = chips // tensor
            if chips % tensor or request.batch % (fsdp * request.accumulate):
                continue
            mesh = {"cell": 1, "data": 1, "fsdp": fsdp, "tensor": tensor}
            own = dataclasses.replace(request, topology=f"{kind}:{layout}", mesh=mesh)
            plans.append(make_plan(own, show))
            if plans[-1].fits:
                return plans
    raise RequestError(
        f"no slice of {kind} up to {SLICES[kind][-1]} holds the step at batch {request.batch}; "
        "raise --accumulate, or give a batch that more chips divide"
    )


def arguments_at_least(request: Request) -> int:
    """Bytes of base and state over all devices, were nothing held twice."""
    model, method = _model_and_method(request)
    state, frozen, _, _ = _abstract(request, model, method)
    return num_bytes(frozen) + num_bytes(state.trainable if request.offload else state)


def step_flops(
    model: Model, method: Method, *, tokens: int, length: int, again: bool = False
) -> float:
    """FLOPs of a step, analytic: XLA counts a scanned layer once.

    Forward two a token for each number of a matrix that meets a product, the head included, and
    4 · length · width for each layer's attention (which makes both halves of the square). Backward
    once more for what passes through, attention twice, and once more for each matrix that trains
    whole; an adapter's own products three times. With `again` layers are computed once more in the
    backward pass, all but the head.
    """
    config = model.config
    products = [path for path, axes in model.axes.items() if "dot_general" in axes.ops]
    sizes = {path: leaf.size for path, leaf in flatten(model.params).items()}
    matrices = 2.0 * tokens * sum(sizes[path] for path in products)
    attention = 4.0 * length * config.hidden_size * config.num_hidden_layers * tokens
    rows = list(method.table(model.params))
    whole = sum(sizes[row.path] for row in rows if row.rank is None and row.path in products)
    adapters = sum(row.num_trainable for row in rows if row.rank is not None)
    flops = 2 * matrices + 3 * attention + 2.0 * tokens * (whole + 3 * adapters)
    if not again:
        return flops
    layers = sum(sizes[path] for path in products if path.startswith("layers/"))
    return flops + attention + 2.0 * tokens * (layers + adapters)
