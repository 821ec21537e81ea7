"""The full grid and fuzzing of `lift` against merge-then-apply, in float64: `make test-slow`.

The grid puts every construct under every transformation, at rank one and at full rank. The fuzzer
draws products at random: any axes of any role in any order, either side, and what may lie between
the kernel and its product.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lora_jax as lj
from tests.core.adapted import (
    inputs_of,
    largest_difference,
    method_of,
    random_like,
    value_and_gradients,
)
from tests.core.constructs import ALL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::lora_jax.MaterialisedWarning"),
]


def scanned(f):
    """`f` three times over in a scan, its results summed."""

    def run(params, x):
        return jax.lax.scan(lambda s, n: (s + f(params, x * n), None), f(params, x), x[:2, 0])[0]

    return run


def under_cond(f):
    return lambda params, x: jax.lax.cond(
        x[0, 0] > -100, f, lambda params, x: -f(params, x), params, x
    )


# Each takes apply(params, x) to another apply(params, x); they act inside `lift`.
AROUND = {
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "remat, dots saved": functools.partial(
        jax.checkpoint, policy=jax.checkpoint_policies.dots_saveable
    ),
    "scan": scanned,
    "cond": under_cond,
    "vmap": lambda f: lambda params, x: jax.vmap(f, in_axes=(None, 0))(params, jnp.stack([x, -x])),
}
# JAX has no vmap of ragged_dot yet: the model alone raises NotImplementedError, with or without us.
NOT_VMAPPED = ("ragged",)
# A gain is on the sum, so it does not follow what is added to the kernel or put around it, nor a
# join in which one output has two gains.
NOT_GAINED = (
    "moved_kernel", "padded_kernel", "kernels_added", "kernels_over_the_inputs", "complex_kernel",
)  # fmt: skip
# Kernels of full rank 2 and 3: an adapter of rank 4 is refused.
NARROW = (
    "grouped_conv", "depthwise_conv", "depthwise_conv_of_keras", "kernels_over_the_inputs",
    "padded_kernel",
)  # fmt: skip


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("name", ALL)
def test_every_construct_under_every_transformation(name, rank, around):
    if around == "vmap" and name.startswith(NOT_VMAPPED):
        pytest.skip(f"JAX cannot vmap {name}")
    if around == "remat, dots saved" and name.startswith("complex"):
        pytest.skip("JAX cannot save complex products: reduce_precision takes real numbers only")
    params, x = inputs_of(name, "float64")
    method = method_of(name, params, x, rank=min(rank, 2) if name in NARROW else rank)
    apply = AROUND[around](ALL[name].apply)
    if name == "custom_jvp_over_a_traced_array" and around != "vmap":
        check_plain_jax_refuses(apply, method, params, x)
        return
    check_against_merge(apply, method, params, x, forward_only=name == "while_loop")


def check_plain_jax_refuses(apply, method, params, x):
    """A rule that closes over an array made in an inner trace has no derivative in JAX itself."""
    merged = method.merge(*method.init(jax.random.key(0), params))
    with pytest.raises((TypeError, jax.errors.UnexpectedTracerError)):
        jax.grad(lambda params: jnp.sum(apply(params, x)))(merged)


@pytest.mark.parametrize("name", ALL)
def test_dora_on_every_construct(name):
    """A gain over a low-rank sum: the value whose products need both at once."""
    params, x = inputs_of(name, "float64")
    method = method_of(name, params, x, lj.DoRA)
    with lj.watch_materialised() as events:
        check_against_merge(ALL[name].apply, method, params, x, forward_only=name == "while_loop")
    low_rank = ALL[name].low_rank and name not in NOT_GAINED
    assert bool(events) != low_rank, [str(event) for event in events]


def check_against_merge(apply, method, params, x, *, forward_only=False, tolerance=1e-9):
    trainable, frozen = method.init(jax.random.key(0), params)
    trainable = random_like(trainable, seed=3)
    found = value_and_gradients(
        lambda t, x: lj.lift(apply)(method.bind(t, frozen), x),
        trainable,
        x,
        forward_only=forward_only,
    )
    expected = value_and_gradients(
        lambda t, x: apply(method.merge(t, frozen), x), trainable, x, forward_only=forward_only
    )
    assert largest_difference(found, expected) < tolerance


@dataclasses.dataclass(frozen=True)
class Product:
    """An einsum of `x` with a kernel that reached it through transposes, reshapes and slices."""

    kernel: str  # axes as letters: s and t stacked, i, j, k contracted, o, p, q kept
    x: str
    out: str
    sizes: dict[str, int]
    kernel_first: bool
    steps: tuple[str, ...]

    @property
    def subscripts(self) -> str:
        left, right = (self.kernel, self.x) if self.kernel_first else (self.x, self.kernel)
        return f"{left},{right}->{self.out}"

    def shape(self, letters: str) -> tuple[int, ...]:
        return tuple(self.sizes[letter] for letter in letters)

    def apply(self, params, x):
        w = params["w"]
        for step in self.steps:
            w = _STEPS[step](w)
        operands = (w, x) if self.kernel_first else (x, w)
        return jnp.einsum(self.subscripts, *operands)


# What a model does to a kernel on its way to the product, each leaving its values as they were.
_STEPS = {
    "moved axes": lambda w: jnp.moveaxis(jnp.moveaxis(w, 0, -1), -1, 0),
    "new axis": lambda w: jnp.expand_dims(w, 1).squeeze(1),
    # Merged, W + ΔW is rounded to float32 as one; lifted, W alone is: the factors keep their bits.
    "cast": lambda w: w.astype(jnp.float32).astype(jnp.float64),
    "split axis": lambda w: w.reshape(*w.shape[:-1], 1, w.shape[-1]).reshape(w.shape),
    "barrier": jax.lax.optimization_barrier,
    "jit": lambda w: jax.jit(lambda w: w.T)(w).T,
}


@st.composite
def products(draw):
    stack = "st"[: draw(st.integers(0, 2))]
    inputs = "ijk"[: draw(st.integers(1, 3))]
    kept = "opq"[: draw(st.integers(1, 2))]
    batch = "bc"[: draw(st.integers(0, 2))]
    mix = lambda letters: "".join(draw(st.permutations(list(letters))))  # noqa: E731
    letters = stack + inputs + kept + batch
    steps = tuple(draw(st.lists(st.sampled_from(sorted(_STEPS)), max_size=3)))
    # A reshape may put an axis of size one anywhere, so `kernel_axes` cannot follow those.
    smallest = 2 if "split axis" in steps else 1
    return Product(
        kernel=mix(stack + inputs + kept),
        x=mix(batch + stack + inputs),
        out=mix(batch + stack + kept),
        sizes={letter: draw(st.integers(smallest, 4)) for letter in letters},
        kernel_first=draw(st.booleans()),
        steps=steps,
    )


@given(product=products(), rank=st.integers(1, 4), around=st.sampled_from([None, "jit", "remat"]))
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_product_of_any_axes(product, rank, around):
    params = {"w": jax.random.normal(jax.random.key(1), product.shape(product.kernel))}
    x = jax.random.normal(jax.random.key(2), product.shape(product.x))
    apply = AROUND[around](product.apply) if around else product.apply
    axes = lj.kernel_axes(apply, params, x)["w"]
    roles = axes.roles(params["w"].ndim, "w")
    sizes = {
        role: math.prod(n for n, r in zip(params["w"].shape, roles, strict=True) if r == role)
        for role in "io"
    }
    method = lj.LoRA(targets="w", rank=min(rank, *sizes.values()), alpha=3.0, axes={"w": axes})
    with lj.watch_materialised() as events:
        check_against_merge(
            apply,
            method,
            params,
            x,
            tolerance=30 * np.finfo(np.float32).eps if "cast" in product.steps else 1e-9,
        )
    assert not events, [str(event) for event in events]
