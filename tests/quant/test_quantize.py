"""A quantised base under methods: adapters, masks, merging, memory, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.core import trees
from tests.core.adapted import normal

X = normal(np.random.default_rng(9), (5, 64))


def apply(params, x):
    h = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return h @ params["down"]["kernel"]


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    return {
        "up": {"kernel": normal(rng, (64, 96), dtype, 1 / 8), "bias": jnp.ones(96, dtype)},
        "down": {"kernel": normal(rng, (96, 32), dtype, 1 / 8)},
    }


def quantized_and_plain(dtype=jnp.float32):
    quantized = lj.quantize(make_params(dtype), ".*/kernel")
    return quantized, lj.quant.dequantize(quantized)


def randomised(trainable, fixed=()):
    """The same with every part moved, so that no path is multiplied by zero."""
    rng = np.random.default_rng(5)
    return {
        name: {
            part: x if part in fixed else x + normal(rng, x.shape, x.dtype, 0.1)
            for part, x in entry.items()
        }
        for name, entry in trainable.items()
    }


KINDS = [
    *(lj.LoRA, lj.DoRA, lj.PiSSA),
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in (lj.RsLoRA, lj.LoRAXS, lj.VeRA, lj.LoRAFA, lj.LoRAPlus)
    ),
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_variant_trains_on_it_as_on_the_dequantised_base(kind):
    quantized, plain = quantized_and_plain()
    alpha = {} if kind is lj.VeRA else {"alpha": 8}
    method = kind(targets=".*/kernel", rank=4, **alpha)
    starts = [method.init(jax.random.key(0), params)[0] for params in (quantized, plain)]
    jax.tree.map(np.testing.assert_array_equal, *starts)
    trainable = randomised(starts[0], kind.FROZEN_PARTS)

    def loss(trainable, params):
        y = lj.lift(apply, strict=True)(method.bind(trainable, params), X)
        return jnp.sum(jnp.sin(y)), y

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    both = [gradient(trainable, p) for p in (quantized, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5), *both)
    merged = method.merge(trainable, quantized, dtype=jnp.float32)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(merged))
    np.testing.assert_allclose(apply(merged, X), both[0][0][1], atol=2e-5)


def test_only_what_trains_gets_gradients_and_updates():
    quantized, _ = quantized_and_plain()
    method = lj.LoRA(targets=".*/kernel", rank=2, alpha=4, train="up/bias")
    trainable, frozen = method.init(jax.random.key(0), quantized)
    bound = method.bind(trainable, frozen)
    mask = method.mask(bound)
    assert jax.tree.structure(mask) == jax.tree.structure(bound)
    trains = [
        leaf for leaf, on in zip(jax.tree.leaves(bound), jax.tree.leaves(mask), strict=True) if on
    ]
    assert sum(x.size for x in trains) == 2 * (64 + 96) + 2 * (96 + 32) + 96
    assert sum(jax.tree.leaves(method.mask(quantized))) == 1  # up/bias
    tx = optax.adamw(1e-2)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            return jnp.sum(lj.lift(apply)(method.bind(trainable, frozen), X) ** 2)

        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    before = jax.tree.map(jnp.copy, jax.tree.leaves(frozen))
    state = tx.init(trainable)
    for _ in range(2):
        trainable, state = step(trainable, state)
    assert float(jnp.abs(trainable["down/kernel"]["b"]).max()) > 1e-3
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.leaves(frozen))


def test_a_parameter_of_four_bits_is_not_trained_whole():
    quantized, _ = quantized_and_plain()
    for method in (
        lj.FullFineTuning(),
        lj.LoRA(targets="up/kernel", rank=1, alpha=1, train="down/.*"),
    ):
        with pytest.raises(
            lj.RequestError, match=r"'down/kernel' \(\d of \d\), which is quantised"
        ):
            method.init(jax.random.key(0), quantized)
    with pytest.raises(lj.RequestError, match="quantised"):
        lj.IntrinsicDimension(targets=".*/kernel", dim=8).init(jax.random.key(0), quantized)
    assert set(
        lj.BitFit().init(jax.random.key(0), quantized | {"head": {"b": jnp.ones(2)}})[0]
    ) >= {"up/bias"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_merging_needs_a_dtype_and_says_what_it_costs(dtype):
    quantized, plain = quantized_and_plain(jnp.bfloat16)
    method = lj.LoRA(targets="up/kernel", rank=4, alpha=8)
    trainable = randomised(method.init(jax.random.key(0), quantized)[0])
    with pytest.raises(lj.RequestError, match="'down/kernel' is quantised.*dtype=jnp.bfloat16"):
        method.merge(trainable, quantized)
    merged = method.merge(trainable, quantized, dtype=dtype)
    assert {x.dtype for path, x in trees.flatten(merged).items() if "kernel" in path} == {
        jnp.dtype(dtype)
    }
    a, b = (np.asarray(trainable["up/kernel"][part], np.float64) for part in "ab")
    whole = np.asarray(plain["up"]["kernel"], np.float64) + 2.0 * a @ b
    rounding = {jnp.bfloat16: 2.0**-8, jnp.float32: 2.0**-22}[dtype]
    np.testing.assert_allclose(
        np.asarray(merged["up"]["kernel"], np.float64), whole, rtol=rounding, atol=1e-7
    )
    errors = lj.quant.merge_error(method, trainable, quantized, dtype=dtype)
    found = np.asarray(merged["up"]["kernel"], np.float64) - whole
    expected = np.linalg.norm(found) / np.linalg.norm(whole)
    assert errors["up/kernel"] == pytest.approx(expected, rel=0.02, abs=1e-7)
    assert errors["down/kernel"] == 0.0  # bfloat16 as it was


def test_requantising_reports_error_and_drift():
    quantized, plain = quantized_and_plain()
    method = lj.LoRA(targets="up/kernel", rank=4, alpha=8)
    trainable = randomised(method.init(jax.random.key(0), quantized)[0])
    found = lj.merge_and_requantize(method, trainable, quantized, apply=apply, inputs=(X,))
    # What was not adapted is the same bytes.
    jax.tree.map(np.testing.assert_array_equal, found.params["down"], quantized["down"])
    whole = np.asarray(method.merge(trainable, plain)["up"]["kernel"], np.float64)
    again = lj.quantize({"up": {"kernel": jnp.asarray(whole, jnp.float32)}}, ".*")["up"]["kernel"]
    np.testing.assert_array_equal(found.params["up"]["kernel"].kernel, again.kernel)
    error = np.linalg.norm(np.asarray(again.dequantize(), np.float64) - whole) / np.linalg.norm(
        whole
    )
    assert found.errors == {"down/kernel": 0.0, "up/kernel": pytest.approx(error, rel=1e-3)}
    change = np.linalg.norm(whole - np.asarray(plain["up"]["kernel"])) / np.linalg.norm(whole)
    assert found.changes["up/kernel"] == pytest.approx(change, rel=1e-3)
    before = np.asarray(apply(method.merge(trainable, plain), X), np.float64)
    after = np.asarray(apply(lj.quant.dequantize(found.params), X), np.float64)
    assert found.drift == pytest.approx(np.abs(after - before).max(), rel=1e-3)
    assert 0 < found.mean_drift < found.drift
    assert np.isnan(lj.merge_and_requantize(method, trainable, quantized).drift)
    with pytest.raises(lj.RequestError, match="nothing in the base is quantised"):
        lj.merge_and_requantize(method, trainable, plain)


def test_two_adapters_on_one_quantised_kernel():
    quantized, plain = quantized_and_plain()
    methods = [lj.LoRA(targets="up/kernel", rank=r, alpha=4) for r in (1, 3)]
    pairs = [(m, randomised(m.init(jax.random.key(n), plain)[0])) for n, m in enumerate(methods)]
    lifted = jax.jit(lambda params: lj.lift(apply)(lj.bind_all(pairs, params), X))
    both = [lifted(params) for params in (quantized, plain)]
    np.testing.assert_allclose(*both, atol=1e-5)


def test_what_cannot_be_quantised_is_skipped_and_listed():
    params = make_params() | {"steps": jnp.ones((4, 4), jnp.int32)}
    with pytest.warns(lj.quant.SkippedWarning, match="'steps' is int32; 'up/bias' is a vector"):
        quantized = lj.quantize(params, ".*")
    assert quantized["up"]["bias"] is params["up"]["bias"]
    assert isinstance(quantized["up"]["kernel"], lj.quant.NF4Weight)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"targets": "up/bias"}, "name no matrix: 'up/bias' is a vector"),
        ({"targets": "(up|dwn)/kernels"}, "matches no parameter; nearest: "),
        ({"format": "nf3"}, "format is 'nf3'; nearest: 'nf4'"),
        ({"params": "quantized"}, "is quantised already"),
        ({"params": "bound"}, "holds an adapter already"),
        ({"params": "nan"}, "'up/kernel' holds NaN or infinity"),
        ({"params": {"up": {"kernel": jnp.ones((2, 3, 4))}}}, "has 3 axes and nothing says"),
    ],
)
def test_bad_requests_are_named(change, says):
    params = make_params()
    if change.get("params") == "quantized":
        change = {"params": quantized_and_plain()[0]}
    elif change.get("params") == "bound":
        method = lj.LoRA(targets=".*/kernel", rank=1, alpha=1)
        change = {"params": method.bind(*method.init(jax.random.key(0), params))}
    elif change.get("params") == "nan":
        params["up"]["kernel"] = params["up"]["kernel"].at[3, 4].set(jnp.nan)
        change = {"params": params}
    request = {"params": params, "targets": ".*/kernel", **change}
    with pytest.raises(lj.RequestError, match=says):
        lj.quantize(**request)
    with pytest.raises(lj.RequestError, match="nothing in the tree is quantised"):
        lj.quant.bits_per_param(make_params())


def scanned(params, x):
    def layer(h, kernel):
        return jnp.tanh(h @ kernel), None

    return jax.lax.scan(layer, x, params["kernel"])[0]


def temporaries(num_layers, size, *, quantize):
    """Bytes that the compiled gradient of a scanned stack keeps beside its arguments."""
    shape = jax.ShapeDtypeStruct((num_layers, size, size), jnp.bfloat16)
    x = jax.ShapeDtypeStruct((4, size), jnp.bfloat16)
    axes = lj.kernel_axes(scanned, {"kernel": shape}, x)
    method = lj.LoRA(targets="kernel", rank=2, alpha=4, axes=axes)

    def start(kernel):
        params = {"kernel": kernel}
        params = lj.quantize(params, "kernel", axes=axes) if quantize else params
        return method.init(jax.random.key(0), params)

    trainable, frozen = jax.eval_shape(start, shape)

    def loss(trainable, frozen, x):
        return jnp.sum(lj.lift(scanned, strict=True)(method.bind(trainable, frozen), x) ** 2)

    compiled = jax.jit(jax.grad(loss)).lower(trainable, frozen, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()


def test_no_dequantised_stack_is_ever_alive():
    size = 256
    few, _ = temporaries(4, size, quantize=True)
    many, text = temporaries(36, size, quantize=True)
    one_layer = size * size * 2
    # Codes are inputs; activations and gradients of 4 rows and rank 2 are a hundredth of a layer.
    assert (many - few) / 32 < 0.1 * one_layer
    assert not any(f"{kind}[36,{size},{size}]" in text for kind in ("f32", "bf16"))


def test_a_quantised_layer_is_found_by_its_index():
    quantized = lj.quantize({"kernel": STACK}, "kernel", axes=STACK_AXES)
    one_by_one = [lj.quantize({"kernel": k}, "kernel")["kernel"].dequantize() for k in STACK]
    plain = quantized["kernel"].dequantize()
    np.testing.assert_array_equal(plain, jnp.stack(one_by_one))

    def by_index(params, x, n):
        return x @ params["kernel"][n]

    lifted = jax.jit(lj.lift(by_index, strict=True))
    for n in range(3):
        y = lifted(quantized, X, n)
        np.testing.assert_allclose(y, X @ plain[n], atol=1e-5)


STACK = normal(np.random.default_rng(3), (3, 64, 64), scale=1 / 8)
STACK_AXES = {"kernel": lj.KernelAxes((-3,), (-2,), (-1,))}


def over_layers(change):
    """A scan over the layers of what `change` makes of the stack; the sum over layers."""

    def apply(params, x):
        kernels = change(params["kernel"])
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w.astype(h.dtype)), None), x, kernels)[0]

    return apply


@pytest.mark.filterwarnings("ignore::lora_jax.MaterialisedWarning")
@pytest.mark.parametrize(
    "change, in_four_bits",
    [
        (lambda w: w[::-1], True),
        (lambda w: w.astype(jnp.bfloat16), True),
        (lambda w: jnp.flip(w, (0, 2)), False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (lambda w: jnp.flip(w, 1), False),
                (lambda w: w.swapaxes(1, 2), False),
                (lambda w: -w, False),
                (lambda w: w[1:], True),
            )
        ),
    ],
)
def test_what_a_model_makes_of_a_stack_before_its_scan(change, in_four_bits):
    """The numbers are right whatever it is; most of it keeps the stack in four bits."""
    quantized = lj.quantize({"kernel": STACK}, "kernel", axes=STACK_AXES)
    plain = lj.quant.dequantize(quantized)
    method = lj.LoRA(targets="kernel", rank=2, alpha=4, axes=STACK_AXES)
    trainable = randomised(method.init(jax.random.key(0), quantized)[0])
    apply = over_layers(change)

    def loss(trainable, params):
        y = lj.lift(apply)(method.bind(trainable, params), X)
        return jnp.sum(jnp.sin(y)), y

    with lj.watch_materialised() as events:
        gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
        found = gradient(trainable, quantized)
    assert not events if in_four_bits else events
    apply_plain = jax.jit(apply)
    merged = apply_plain(method.merge(trainable, plain), X)
    np.testing.assert_allclose(found[0][1], merged, atol=3e-2 if "bfloat16" in str(
        jax.make_jaxpr(change)(STACK)) else 1e-5)  # fmt: skip
    expected = gradient(trainable, plain)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)
    alone = jax.jit(lj.lift(apply))(quantized, X)
    np.testing.assert_allclose(alone, apply_plain(plain, X), atol=1e-5)


def test_a_mark_of_where_a_stack_lies_is_none_of_its_four_bits():
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "a", "b"))
    apply = over_layers(lambda w: jax.lax.with_sharding_constraint(w, where))
    quantized = lj.quantize({"kernel": STACK}, "kernel", axes=STACK_AXES)
    found = jax.jit(lj.lift(apply, strict=True))(quantized, X)
    np.testing.assert_allclose(found, apply(lj.quant.dequantize(quantized), X), atol=1e-5)


def test_dora_over_a_stack_has_its_norms_layer_by_layer():
    quantized = lj.quantize({"kernel": STACK}, "kernel", axes=STACK_AXES)
    plain = lj.quant.dequantize(quantized)
    method = lj.DoRA(targets="kernel", rank=2, alpha=4, axes=STACK_AXES)
    trainable = randomised(method.init(jax.random.key(0), quantized)[0])
    apply = over_layers(lambda w: w)
    lifted = jax.jit(lambda params: lj.lift(apply)(method.bind(trainable, params), X))
    both = [lifted(params) for params in (quantized, plain)]
    np.testing.assert_allclose(*both, atol=1e-5)
    np.testing.assert_allclose(apply(method.merge(trainable, plain), X), both[0], atol=1e-5)


def test_several_adapters_merge_with_a_dtype():
    quantized, plain = quantized_and_plain()
    methods = [lj.LoRA(targets="up/kernel", rank=r, alpha=4) for r in (1, 3)]
    pairs = [(m, randomised(m.init(jax.random.key(n), plain)[0])) for n, m in enumerate(methods)]
    merged = [lj.merge_all(pairs, quantized, dtype="stored"), lj.merge_all(pairs, plain)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *merged)
    own = lj.arithmetic.Adapter(*pairs[0], quantized)
    assert own.base_hash != lj.arithmetic.Adapter(*pairs[0], plain).base_hash
    np.testing.assert_allclose(
        own.merge(dtype=jnp.float32)["up"]["kernel"],
        pairs[0][0].merge(pairs[0][1], plain)["up"]["kernel"],
        atol=1e-6,
    )


def test_rows_of_a_quantised_table_are_refused():
    quantized = lj.quantize({"table": STACK[0]}, "table")
    method = lj.HeadOnly(train=(), rows={"table": (1, 2)})
    with pytest.raises(lj.RequestError, match="rows=.* 'table' .*which is quantised"):
        method.init(jax.random.key(0), quantized)
