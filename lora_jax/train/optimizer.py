"""AdamW with warm-up, a schedule and clipping, as one optax transformation."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lora_jax.core import trees
from lora_jax.core.errors import RequestError
from lora_jax.settings import OptimizerSettings


def make_schedule(settings: OptimizerSettings, num_steps: int) -> optax.Schedule:
    """Learning rate by step: rises from 0 over the warm-up, then linear, cosine or constant.

    The warm-up takes `warmup_steps`, where that is not 0, or else
    `ceil(warmup_ratio * num_steps)` steps; step i of it has the rate `lr * i / warmup`, and
    linear and cosine reach 0 at `num_steps` (as `transformers.get_scheduler` has them).
    Raises `RequestError` for an unknown schedule or a value out of range.
    """
    if num_steps < 1:
        raise RequestError(f"num_steps={num_steps}: a training needs at least one step")
    settings.check()
    _warmup_steps(settings, num_steps)  # for its check
    shape, peak = _shape_of_schedule(settings, num_steps), float(settings.lr)
    return lambda step: peak * shape(step)


def _shape_of_schedule(settings: OptimizerSettings, num_steps: int) -> optax.Schedule:
    """The schedule of a learning rate whose peak is 1."""
    warmup = _warmup_steps(settings, num_steps)
    decay = max(1, num_steps - warmup)
    after = {
        "linear": optax.linear_schedule(1.0, 0.0, decay),
        "cosine": optax.cosine_decay_schedule(1.0, decay),
        "constant": optax.constant_schedule(1.0),
    }[settings.schedule]
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, 1.0, warmup), after], [warmup])


def _warmup_steps(settings: OptimizerSettings, num_steps: int) -> int:
    steps = settings.warmup_steps
    if steps and settings.warmup_ratio:
        raise RequestError(
            f"optimizer.warmup_steps={steps} and optimizer.warmup_ratio={settings.warmup_ratio} "
            "both say how long the warm-up is; set one of them to 0"
        )
    return steps or math.ceil(settings.warmup_ratio * num_steps)


def make_optimizer(settings: OptimizerSettings, num_steps: int) -> optax.GradientTransformation:
    """Global-norm clipping, then AdamW on the schedule, all in float32 (Loshchilov & Hutter 2019).

    What is clipped is the tree the gradients come in, which is the trainable one. Weight decay
    reaches every trainable parameter, as in `torch.optim.AdamW`. `moment_dtype` is the dtype of the
    moments. Raises `RequestError` for a value out of range.
    """
    return _in_dtype(
        optax.chain(_clip(settings, num_steps), *_adamw(settings, num_steps)), settings
    )


def optimizer_parts(
    settings: OptimizerSettings, num_steps: int
) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    """`make_optimizer` in two: the clipping, which sees all gradients, and what does to each
    parameter what it would do to it alone. Raises as that does, and for a rate of the head or of
    a path, since a parameter alone has no path."""
    for name in ("head_lr", "lr_by_path"):
        if value := settings[name]:
            raise RequestError(
                f"optimizer.{name}={value!r} needs optimizer.offload=False: offloaded "
                "moments are updated parameter by parameter, all at one learning rate"
            )
    each = optax.chain(*_adamw(settings, num_steps))
    return in_float32(_clip(settings, num_steps)), _in_dtype(each, settings)


def make_own_optimizer(
    of_rate: Callable[[Any], optax.GradientTransformation],
    settings: OptimizerSettings,
    num_steps: int,
) -> optax.GradientTransformation:
    """As `make_optimizer`, with `of_rate(learning_rate)` in the place of AdamW.

    The rate is traced, and its peak is kept in the state, so that runs which differ in it share a
    program. Raises `RequestError` for a value out of range.
    """
    clip, shape = _clip(settings, num_steps), _shape_of_schedule(settings, num_steps)

    def init(params):
        state = RateState.first(settings.lr)
        return state, of_rate(state.peak).init(params)

    def update(updates, state, params=None):
        rate, own = state
        tx = of_rate(rate.peak * shape(rate.count))
        updates, own = tx.update(updates, own, params)
        return updates, (rate.next(), own)

    return in_float32(optax.chain(clip, optax.GradientTransformation(init, update)))


def _clip(settings: OptimizerSettings, num_steps: int) -> optax.GradientTransformation:
    """The clipping; all settings are checked."""
    make_schedule(settings, num_steps)
    return optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()


def _adamw(settings: OptimizerSettings, num_steps: int) -> tuple[optax.GradientTransformation, ...]:
    """What comes after the clipping."""
    return (
        optax.scale_by_adam(settings.beta1, settings.beta2, settings.eps),
        _decay_weights(settings.weight_decay),
        _scale_by_rate(settings, _shape_of_schedule(settings, num_steps)),
    )


def _in_dtype(
    tx: optax.GradientTransformation, settings: OptimizerSettings
) -> optax.GradientTransformation:
    """`tx` computing in float32, what it keeps of each parameter between steps in `moment_dtype`.

    Half the memory. In bfloat16 a moving average with a decay of 0.999 or more hardly moves, since
    its changes are below half of its last bit. Scalars stay float32.
    """
    tx, dtype = in_float32(tx), jnp.dtype(settings.moment_dtype)
    if dtype == jnp.float32:
        return tx

    def narrowed(state):
        narrow = lambda x: x.astype(dtype) if jnp.ndim(x) and x.dtype == jnp.float32 else x  # noqa: E731
        return jax.tree.map(narrow, state)

    def update(updates, state, params=None):
        updates, state = tx.update(updates, _widened(state), params)
        return updates, narrowed(state)

    return optax.GradientTransformation(lambda params: narrowed(tx.init(params)), update)


class RateState(NamedTuple):
    """Steps taken, () int32, and peak learning rates, () float32: of all, of the head alone, and
    of each expression of `lr_by_path`."""

    count: Any
    peak: jax.Array
    head_peak: Any = None
    peaks: tuple[jax.Array, ...] = ()

    @classmethod
    def first(cls, peak: float, head_peak: float = 0.0, peaks: Sequence[float] = ()) -> RateState:
        peak_of, zero = functools.partial(jnp.asarray, dtype=jnp.float32), jnp.zeros((), jnp.int32)
        own = peak_of(head_peak) if head_peak else None
        return cls(zero, peak_of(peak), own, tuple(map(peak_of, peaks)))

    def next(self) -> RateState:
        return self._replace(count=optax.safe_increment(self.count))


def _scale_by_rate(
    settings: OptimizerSettings, shape: optax.Schedule
) -> optax.GradientTransformation:
    """Updates times `-peak * shape(step)`, the peaks in the state.

    So runs that differ in their learning rates alone compile to one program, and may share it.
    `lr_by_path` takes a parameter's path, or that of one of its parts (`…/kernel/b`).
    """
    expressions = [re.compile(expression) for expression, _ in settings.lr_by_path]

    def peak_of(path: str, state: RateState) -> jax.Array:
        for expression, peak in zip(expressions, state.peaks, strict=True):
            if _matches(expression, path):
                return peak
        own = state.head_peak if path.startswith("head/") else None
        return state.peak if own is None else own

    def init(params):
        paths = [_path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        for expression in expressions:
            if not any(_matches(expression, path) for path in paths):
                near = trees.nearest(expression.pattern, paths)
                raise RequestError(
                    f"optimizer.lr_by_path: {expression.pattern!r} matches nothing that trains; "
                    f"{near}"
                )
        return RateState.first(settings.lr, settings.head_lr, [x for _, x in settings.lr_by_path])

    def update(updates, state, params=None):
        now = shape(state.count)
        scaled = lambda path, u: (-peak_of(_path_of(path), state) * now * u).astype(u.dtype)  # noqa: E731
        return jax.tree_util.tree_map_with_path(scaled, updates), state.next()

    return optax.GradientTransformation(init, update)


def _path_of(path: tuple[Any, ...]) -> str:
    """`encoder/kernel/b` of a leaf of the trainable tree."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _matches(expression: re.Pattern[str], path: str) -> bool:
    """Whether it matches the path of a part, or that of its parameter."""
    return any(map(expression.fullmatch, (path, path.rpartition("/")[0])))


class DecayState(NamedTuple):
    """The weight decay, () float32."""

    rate: jax.Array


def _decay_weights(rate: float) -> optax.GradientTransformation:
    """Updates plus `rate * parameter`, the rate in the state for the same reason."""

    def update(updates, state, params=None):
        add = lambda u, p: u + (state.rate * p).astype(u.dtype)  # noqa: E731
        return jax.tree.map(add, updates, params), state

    init = lambda params: DecayState(jnp.asarray(rate, jnp.float32))  # noqa: E731
    return optax.GradientTransformation(init, update)


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` computing in float32 whatever the parameters' dtype: state, norms and updates.

    Updates leave in float32, so that `optax.apply_updates` adds them in float32 and rounds once.
    (`optax.adam(mu_dtype=float32)` is not enough: the second moment stays in the parameters' dtype,
    and a bfloat16 one stops moving once `1 - beta2` falls below half its last bit.)
    """

    def update(updates, state, params=None):
        return tx.update(_widened(updates), state, _widened(params))  # None has no leaves

    return optax.GradientTransformation(lambda params: tx.init(_widened(params)), update)


def _widened(tree):
    def widen(leaf):
        narrow = jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
        return leaf.astype(jnp.float32) if narrow else leaf

    return jax.tree.map(widen, tree)
