"""What the compiled step does: only the arithmetic that its rank and targets need."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lora_jax as lj
from lora_jax.models.bert.modeling import ALIASES, Bert, BertConfig
from lora_jax.models.functional import functional, unflatten
from lora_jax.train import init_state, make_train_step
from lora_jax.train.loss import make_loss

B, T, R = 32, 32, 8
# MiniLM's shapes; no weights are needed to compile.
CONFIG = BertConfig(
    vocab_size=30522,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=12,
    intermediate_size=1536,
    max_position_embeddings=512,
)
D, F, L = CONFIG.hidden_size, CONFIG.intermediate_size, CONFIG.num_hidden_layers
SHAPES = {
    "query": (D, D), "key": (D, D), "value": (D, D), "attention/output": (D, D),
    "intermediate": (D, F), "mlp/output": (F, D),
}  # fmt: skip


def lowered(method):
    """The lowered train step and its jaxpr, and the shapes of its state."""
    shapes, apply = functional(lambda: Bert(CONFIG, num_labels=2, pooling="mean", rngs=nnx.Rngs(0)))
    params = unflatten(shapes)
    tx = optax.adamw(1e-3)
    state, frozen = jax.eval_shape(lambda params: _init(method, params, tx), params)
    batch = {
        name: jax.ShapeDtypeStruct((B, T), jnp.int32) for name in ("input_ids", "attention_mask")
    }
    batch |= {"labels": jax.ShapeDtypeStruct((B,), jnp.int32)}
    batch |= {"weights": jax.ShapeDtypeStruct((B,), jnp.float32)}
    step = make_train_step(make_loss(apply, method), tx)
    return step.trace(state, frozen, batch), state, params


def _init(method, params, tx):
    trainable, frozen = method.init(jax.random.key(0), params)
    return init_state(trainable, tx, jax.random.key(1)), frozen


def lora(targets):
    return lj.LoRA(targets=targets, rank=R, alpha=16.0, train="head/.*", aliases=ALIASES)


def analytic_floor(adapted: set[str], *, rank: int = R, full: bool = False) -> float:
    """Floating-point operations of the products that no implementation can leave out.

    Forward: each kernel once, the scores and their use, each adapter's two thin products. Backward:
    the gradient of each product's input, except in layer 0, where query, key and value have a
    frozen input; and the gradient of what trains. A product of (n, i) by (i, o) counts 2·n·i·o.
    """
    n = B * T
    attention = 2 * B * T * T * D  # one batched product over all heads
    total = 0.0
    for layer in range(L):
        for name, (i, o) in SHAPES.items():
            needs_input_gradient = full or layer > 0 or name not in ("query", "key", "value")
            products = 1 + needs_input_gradient + full
            total += 2 * n * i * o * products
            if name in adapted:
                # x·a and h·b; then dh, db, da, and through a to the input where that is needed.
                total += 2 * n * rank * (3 * o + 2 * i + needs_input_gradient * i)
        # Scores and mixing; backward: of queries, keys, probabilities and values. The keys of layer
        # 0 lead to nothing that trains, unless they are adapted themselves.
        backward = 4 if full or layer > 0 or "key" in adapted else 3
        total += attention * (2 + backward)
    return total


@pytest.fixture(scope="module")
def programs():
    methods = {"qv": lora("q,v"), "all": lora("all-linear"), "full": lj.FullFineTuning()}
    return {name: lowered(method) for name, method in methods.items()}


@pytest.fixture(scope="module")
def flops(programs):
    return {
        name: traced.lower().compile().cost_analysis()["flops"]
        for name, (traced, _, _) in programs.items()
    }


ADAPTED = {"qv": {"query", "value"}, "all": set(SHAPES)}


@pytest.mark.parametrize("name", ADAPTED)
def test_the_products_are_those_of_the_analytic_floor(name, programs):
    traced, _, _ = programs[name]
    counted = sum(flops for _, flops in _products(traced.jaxpr.jaxpr))
    head = 6 * B * D * 2  # the task head, forward and backward
    assert counted == pytest.approx(analytic_floor(ADAPTED[name]) + head, rel=1e-4)


def plain_floor(adapted: set[str]) -> float:
    """XLA's own count of the plain model without any adapter, plus the adapters' products.

    The plain program takes the gradient of the biases of the adapted layers and of the head: to get
    there it runs forward and backward through all the frozen arithmetic (softmax, GELU, norms) that
    a step on those layers cannot do without.
    """
    places = "|".join(sorted(adapted))
    biases = re.compile(rf"encoder/layers/\d+/(?:attention/|mlp/|)(?:{places})/bias|head/.*")
    shapes, apply = functional(lambda: Bert(CONFIG, num_labels=2, pooling="mean", rngs=nnx.Rngs(0)))
    trained = {path: leaf for path, leaf in shapes.items() if biases.fullmatch(path)}
    frozen = {path: leaf for path, leaf in shapes.items() if path not in trained}
    assert len(trained) == L * len(adapted) + 2

    def loss(trained, frozen, ids, mask, labels):
        logits = apply(unflatten({**trained, **frozen}), ids, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    labels = jax.ShapeDtypeStruct((B,), jnp.int32)
    program = jax.jit(jax.value_and_grad(loss)).lower(trained, frozen, tokens, tokens, labels)
    products = analytic_floor(adapted) - analytic_floor(adapted, rank=0)
    return program.compile().cost_analysis()["flops"] + products


@pytest.mark.parametrize(
    "name", [n if n == "qv" else pytest.param(n, marks=pytest.mark.slow) for n in ADAPTED]
)
def test_xla_counts_the_plain_model_and_the_adapters_products_and_no_more(
    name, flops, record_property
):
    """Within 1%; seen 1.0002 on q,v and 1.0012 on all linears, with JAX 0.10 and 0.12 alike.

    Over the products alone (`analytic_floor`, which leaves softmax, GELU and norms out) the count
    is 1.009 and 1.010 with 0.10, 1.013 and 1.014 with 0.12; full fine-tuning's is 1.012 over its
    own.
    """
    ratio = flops[name] / plain_floor(ADAPTED[name])
    record_property("flops_over_floor", ratio)
    record_property("flops_over_products", flops[name] / analytic_floor(ADAPTED[name]))
    assert abs(ratio - 1) < 0.01


def test_lora_on_q_and_v_needs_about_two_thirds_of_full_fine_tuning(flops):
    assert abs(flops["qv"] / flops["full"] - 2 / 3) < 0.02
    floors = analytic_floor(ADAPTED["qv"]), analytic_floor(set(), full=True)
    assert abs(floors[0] / floors[1] - 2 / 3) < 0.02


@pytest.mark.parametrize("name", ADAPTED)
def test_optimizer_state_holds_nothing_of_the_frozen_tree(name, programs):
    _, state, params = programs[name]
    frozen = {leaf.shape for leaf in jax.tree.leaves(params)} - {(D, 2), (2,)}
    moments = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert not frozen & set(moments)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    assert sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim) == 2 * trained


@pytest.mark.parametrize("name", ADAPTED)
def test_the_backward_pass_has_no_product_of_a_frozen_kernels_shape(name, programs):
    traced, _, _ = programs[name]
    kernels = set(SHAPES.values()) | {shape[::-1] for shape in SHAPES.values()}
    found = [shape for shape, _ in _products(traced.jaxpr.jaxpr) if shape in kernels]
    assert not found
    full, _, _ = programs["full"]
    assert [shape for shape, _ in _products(full.jaxpr.jaxpr) if shape in kernels]


def _products(jaxpr):
    """(shape, FLOPs) of every product, those inside sub-programs included."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            shape = eqn.outvars[0].aval.shape
            (contracted, _), _ = eqn.params["dimension_numbers"]
            summed = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            yield shape, 2 * math.prod(shape) * summed
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from _products(inner)
