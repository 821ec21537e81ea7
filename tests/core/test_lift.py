"""`lift` against its oracle: merge, then plain apply, gives the same outputs and gradients."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from tests.core.adapted import largest_difference, random_like, setting, value_and_gradients
from tests.core.constructs import ALL

# JAX cannot vmap a ragged product over its kernels; a mesh or a Pallas kernel is its own matter.
NOT_VMAPPED = ("ragged",)  # JAX itself cannot, yet
TOLERANCE = {"float64": 1e-9, "float32": 1e-5}
# One of each kind; the other constructs take the same ways through `lift` and wait for the slow
# tests where a test compiles much.
FEW = (
    "dense", "dense_general", "transposed_reshaped_cast", "tied_embedding", "scanned_with_remat",
    "layers_by_index", "cond_branches", "grad_inside", "custom_vjp_beside", "grouped_conv",
    "mixture_of_experts", "fused_slice", "weight_norm",
)  # fmt: skip


def few_fast(names):
    """Parameters of a test: those of `FEW` at once, the rest among the slow tests."""
    return [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture(params=["float64", pytest.param("float32", marks=pytest.mark.slow)])
def dtype(request):
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", request.param == "float64")
    yield request.param
    jax.config.update("jax_enable_x64", before)


@pytest.mark.filterwarnings("ignore::lora_jax.MaterialisedWarning")
@pytest.mark.parametrize("name", ALL)
def test_outputs_and_gradients_equal_merge_then_apply(name, dtype):
    apply, method, trainable, frozen, x = setting(name, dtype)
    forward_only = name == "while_loop"

    def lifted(trainable, x):
        return lj.lift(apply)(method.bind(trainable, frozen), x)

    def merged(trainable, x):
        return apply(method.merge(trainable, frozen), x)

    with lj.watch_materialised() as events:
        found = value_and_gradients(lifted, trainable, x, forward_only=forward_only)
    assert bool(events) != ALL[name].low_rank, [str(event) for event in events]
    expected = value_and_gradients(merged, trainable, x, forward_only=forward_only)
    assert largest_difference(found, expected) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore::lora_jax.MaterialisedWarning")
@pytest.mark.parametrize("name", few_fast(n for n in ALL if not n.startswith(NOT_VMAPPED)))
def test_vmap_over_adapters_equals_one_by_one(name, dtype):
    """Outputs, and the gradients of each adapter, from `vmap` of the gradient."""
    apply, method, trainable, frozen, x = setting(name, dtype)
    many = [random_like(trainable, seed) for seed in (3, 4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *many)
    moved = [random_like(trainable, seed) for seed in (5, 6)]
    tangents = jax.tree.map(lambda *leaves: jnp.stack(leaves), *moved)

    def of(f):
        def loss(trainable):
            y = f(trainable)
            return jnp.sum(jnp.sin(y)), y

        if name == "while_loop":  # forward mode only
            return lambda trainable, tangent: jax.jvp(f, (trainable,), (tangent,))
        return lambda trainable, _: jax.value_and_grad(loss, has_aux=True)(trainable)

    lifted = of(lambda t: lj.lift(apply)(method.bind(t, frozen), x))
    merged = jax.jit(of(lambda t: apply(method.merge(t, frozen), x)))
    together = jax.jit(jax.vmap(lifted))(stacked, tangents)
    for n in range(2):
        found = jax.tree.map(lambda leaf, n=n: leaf[n], together)
        assert largest_difference(found, merged(many[n], moved[n])) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore::lora_jax.MaterialisedWarning")
@pytest.mark.parametrize("name", few_fast(ALL))
def test_fresh_adapter_gives_the_base_bit_for_bit(name):
    """Operation by operation: compiled as one program, XLA may take another routine for the frozen
    product because of the adapter's beside it, and sum in another order."""
    apply, method, trainable, frozen, x = setting(name, "float32")
    fresh, _ = method.init(jax.random.key(0), frozen)
    with jax.disable_jit():
        base = apply(frozen, x)
        assert np.array_equal(base, lj.lift(apply)(method.bind(fresh, frozen), x))
        other = lj.lift(apply)(method.bind(trainable, frozen), x)
    assert not np.array_equal(base, other), "a random adapter must change the output"


# Left out: a user's own dense rule ("around"), activations that have the kernel's shape by
# construction (tied, inner_jit), factors joined along the rank that have it (fused), a loop without
# a backward pass, and what takes exactly five rows (convolutions, ragged products), where the
# counter of materialisations alone speaks.
NO_DENSE_PRODUCT = [
    name
    for name in ALL
    if ALL[name].low_rank
    and "around" not in name
    and not name.startswith(("custom_vjp_with", "custom_jvp_with", "custom_jvp_over"))
    and "conv" not in name
    and "ragged" not in name
    and name not in ("while_loop", "tied_both_ways", "inner_jit", "kernels_fused_inside")
]


@pytest.mark.parametrize("name", NO_DENSE_PRODUCT)
def test_no_product_of_a_kernels_shape_is_formed(name):
    """Neither ΔW in the forward pass nor a gradient of the kernel in the backward pass."""
    apply, method, trainable, frozen, x = setting(name, "float32")
    x = jnp.concatenate([x] * 3)[:11] if name not in ("dot_product_attention",) else x

    def loss(trainable):
        return jnp.sum(lj.lift(apply)(method.bind(trainable, frozen), x) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(trainable)
    kernels = {kernel.shape for kernel in frozen.values()}
    kernels |= {shape[1:] for shape in kernels if len(shape) == 3}
    kernels |= {shape[::-1] for shape in kernels}
    products = [
        eqn.outvars[0].aval.shape
        for eqn in _equations(jaxpr.jaxpr)
        if eqn.primitive.name == "dot_general"
    ]
    assert products
    assert not [shape for shape in products if shape in kernels]


def _equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _equations(inner)


def test_lifting_twice_is_lifting_once():
    apply, method, trainable, frozen, x = setting("dense", "float32")
    lifted = lj.lift(apply)
    assert lj.lift(lifted) is lifted
    assert np.array_equal(
        lifted(method.bind(trainable, frozen), x),
        lj.lift(lifted)(method.bind(trainable, frozen), x),
    )


def test_lift_is_the_function_itself_without_adapted_values():
    calls = []
    lifted = lj.lift(lambda x, *, flag: calls.append((x, flag)))
    lifted("text", flag=True)
    assert calls == [("text", True)]


def test_python_arguments_stay_static():
    def apply(params, x, *, scale, mode):
        return (x @ params["w"]) * (scale if mode == "on" else 0.0)

    _, method, trainable, frozen, x = setting("dense", "float32")
    out = lj.lift(apply)(method.bind(trainable, frozen), x, scale=2.0, mode="on")
    expected = apply(method.merge(trainable, frozen), x, scale=2.0, mode="on")
    assert largest_difference(out, expected) < 1e-5


def test_materialising_is_said_once_with_path_primitive_and_line_and_refused_when_strict():
    apply, method, trainable, frozen, x = setting("weight_norm", "float32")
    bound = method.bind(trainable, frozen)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        lj.lift(apply)(bound, x)
        lj.lift(apply)(bound, x)
    messages = [str(w.message) for w in caught if w.category is lj.MaterialisedWarning]
    assert len(set(messages)) == len(messages)
    assert any("'w'" in m and "div" in m and "constructs.py" in m for m in messages)
    with pytest.raises(lj.RequestError, match="'w' is materialised"):
        lj.lift(apply, strict=True)(bound, x)


def test_dropout_needs_a_key_and_drops_only_the_adapters_input():
    apply, method, trainable, frozen, x = setting("dense", "float32", dropout=0.5)
    lifted = jax.jit(lj.lift(apply))
    silent = lifted(method.bind(trainable, frozen), x)
    assert largest_difference(silent, apply(method.merge(trainable, frozen), x)) < 1e-5

    a, b = trainable["w"]["a"], trainable["w"]["b"]
    keys = jax.random.split(jax.random.key(7), 4000)
    outs = jax.vmap(lambda k: lifted(method.bind(trainable, frozen, key=k), x))(keys)
    assert len(np.unique(np.asarray(outs[:, 0, 0]))) > 2
    # E[dropout(x)] = x, so the mean over keys is the output without dropout.
    error = np.asarray(outs.std(axis=0)) / np.sqrt(len(keys))
    assert np.all(np.abs(np.asarray(outs.mean(axis=0) - silent)) < 6 * error)
    zeroed = {"w": {"a": a, "b": jnp.zeros_like(b)}}
    kept = lifted(method.bind(zeroed, frozen, key=keys[0]), x)
    assert np.array_equal(kept, jax.jit(apply)(frozen, x))


def test_scanned_layers_draw_different_dropout_masks():
    def apply(params, x):
        return jax.lax.scan(lambda _, w: (None, x @ w), None, params["w"])[1]

    params = {"w": jnp.zeros((2, 6, 6))}
    method = lj.LoRA(
        targets="w",
        rank=2,
        alpha=2.0,
        dropout=0.5,
        axes=lj.kernel_axes(apply, params, jnp.ones((5, 6))),
    )
    trainable, frozen = method.init(jax.random.key(0), params)
    one = random_like(jax.tree.map(lambda leaf: leaf[0], trainable), 1)
    trainable = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), one)
    first, second = lj.lift(apply)(
        method.bind(trainable, frozen, key=jax.random.key(1)), jnp.ones((5, 6))
    )
    assert not np.allclose(first, second)


@pytest.mark.parametrize("name", ["custom_vjp_around", "custom_jvp_around"])
def test_dropout_in_a_kernel_with_a_gradient_of_its_own_is_refused(name):
    """The user's rule is that of one fixed weight: it would not be the dropped one's gradient."""
    apply, method, trainable, frozen, x = setting(name, "float32", dropout=0.5)
    with pytest.raises(lj.RequestError, match="adapter dropout and meets `custom_.*dropout=0"):
        lj.lift(apply)(method.bind(trainable, frozen, key=jax.random.key(0)), x)


def test_where_dropout_does_nothing_it_is_said():
    apply, method, trainable, frozen, x = setting("weight_norm", "float32", dropout=0.5)
    with pytest.warns(lj.MaterialisedWarning, match="its adapter dropout does nothing there"):
        lj.lift(apply)(method.bind(trainable, frozen, key=jax.random.key(0)), x)


def test_bfloat16_kernels_with_float32_factors():
    apply = ALL["dense"].apply
    params = random_like({"w": jnp.zeros((64, 32), jnp.bfloat16)}, 1)
    method = lj.LoRA(targets="w", rank=4, alpha=4.0)
    trainable, frozen = method.init(jax.random.key(0), params)
    trainable = random_like(trainable, 3)
    assert trainable["w"]["a"].dtype == jnp.float32
    x = jax.random.normal(jax.random.key(2), (16, 64), jnp.bfloat16)
    y = lj.lift(apply)(method.bind(trainable, frozen), x)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ (
        np.asarray(params["w"], np.float64)
        + np.asarray(trainable["w"]["a"], np.float64) @ np.asarray(trainable["w"]["b"], np.float64)
    )
    # Two roundings to 8 bits, of the frozen product and of the sum, and those of the factors.
    assert np.max(np.abs(np.asarray(y, np.float64) - exact)) < 0.03 * np.abs(exact).max()


def test_merge_then_lift_refuses_a_tree_bound_twice():
    _, method, trainable, frozen, _ = setting("dense", "float32")
    bound = method.bind(trainable, frozen)
    with pytest.raises(lj.RequestError, match="bound already"):
        method.bind(trainable, bound)
