"""What names a place in the user's model, a scope or a line, survives lifting."""

from __future__ import annotations

import re
import traceback

import jax
import jax.numpy as jnp
import pytest
from jax._src import source_info_util

import lora_jax as lj
from tests.core.adapted import random_like

PARAMS = {"w": jnp.ones((6, 4)), "v": jnp.ones((4, 4)), "table": jnp.ones((6, 6))}
X = jax.random.normal(jax.random.key(0), (5, 6))


def model(params, x):
    with jax.named_scope("embed"):
        x = x + params["table"][jnp.argmax(x, axis=1)]  # LINE lookup

    def layer(h, _):
        with jax.named_scope("layer"):
            return jnp.tanh(h @ params["v"]), None  # LINE scanned

    @jax.checkpoint
    def encoder(x):
        with jax.named_scope("encoder"), jax.named_scope("query"):
            return jnp.tanh(x @ params["w"])  # LINE query

    h = jax.lax.scan(layer, encoder(x), None, length=2)[0]
    with jax.named_scope("head"):
        return jnp.sqrt(h.sum() - 21)  # LINE head: not a number, 20 values of tanh


def line_of(mark):
    with open(__file__) as file:
        return next(n for n, line in enumerate(file, 1) if f"# LINE {mark}" in line)


METHOD = lj.LoRA(targets=".*", rank=2)
START, FROZEN = METHOD.init(jax.random.key(0), PARAMS)
TRAINABLE = random_like(START, 3)


def lifted(trainable, x):
    return lj.lift(model)(METHOD.bind(trainable, FROZEN), x)


def merged(trainable, x):
    return model(METHOD.merge(trainable, FROZEN), x)


def scopes(f):
    """The model's scopes around each product and lookup of the compiled gradient."""
    text = jax.jit(jax.grad(f)).lower(TRAINABLE, X).compile().as_text()
    names = re.findall(r'op_name="([^"]*(?:dot_general|gather))"', text)
    known = ("embed", "encoder/query", "layer", "head")
    bare = [
        re.sub(r"\b(jvp|transpose|rematted_computation|checkpoint)\b|[()]", "", n) for n in names
    ]
    return {scope for scope in known for name in bare if re.search(rf"\b{scope}\b", name)}, names


def test_every_product_of_an_adapter_stands_in_the_scope_of_its_weights_product():
    found, names = scopes(lifted)
    assert found == scopes(merged)[0] == {"embed", "encoder/query", "layer"}
    # None stands outside: a profile shows the adapter's time where the model's time is.
    inside = re.compile("embed|encoder.*query|layer")
    assert names and not [name for name in names if not inside.search(name)]


def test_every_operation_has_the_line_of_the_model_that_made_it():
    jaxpr = jax.make_jaxpr(lifted)(TRAINABLE, X)
    # Runs of operations without adapters have the line of their first, here the sum in the head's.
    lines = {mark: line_of(mark) for mark in ("lookup", "scanned", "query", "head")}
    seen = dict.fromkeys(lines, 0)
    for eqn in equations(jaxpr.jaxpr):
        if eqn.primitive.name in ("dot_general", "gather", "sqrt"):
            frame = source_info_util.user_frame(eqn.source_info.traceback)
            assert frame.file_name == __file__
            seen[next(m for m, n in lines.items() if n == frame.start_line)] += 1
    # The frozen product, and two for the factors; the table's lookup, and one of A's rows.
    assert seen["query"] == seen["scanned"] == 3 and seen["head"] == 1 and seen["lookup"] >= 2


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def test_an_error_in_the_model_shows_the_models_line():
    def wrong(params, x):
        return x @ params["w"] @ jnp.ones((5, 3))  # LINE wrong

    with pytest.raises(TypeError) as caught:
        lj.lift(wrong)(METHOD.bind(TRAINABLE, FROZEN), X)
    shown = "".join(traceback.format_exception(caught.value))
    assert "# LINE wrong" in shown


@pytest.mark.parametrize("around", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_nan_found_by_jax_debug_nans_names_the_models_line(around):
    jax.config.update("jax_debug_nans", True)
    try:
        with pytest.raises(FloatingPointError, match="invalid value .nan.") as caught:
            around(lifted)(TRAINABLE, X)
    finally:
        jax.config.update("jax_debug_nans", False)
    (note,) = (note for note in caught.value.__notes__ if "lifted model" in note)
    assert f"test_source.py:{line_of('head')}" in note and "`sqrt`" in note


@pytest.mark.filterwarnings("ignore::lora_jax.MaterialisedWarning")
@pytest.mark.parametrize("function", [jnp.sort, jnp.linalg.inv])
def test_a_materialisation_inside_a_function_of_jax_names_the_users_line(function):
    params = {"w": jnp.eye(4)}
    method = lj.LoRA(targets="w", rank=2, alpha=2)
    trainable, frozen = method.init(jax.random.key(0), params)
    with lj.watch_materialised() as events:
        lj.lift(lambda p: function(p["w"]))(method.bind(trainable, frozen))
    assert events and all("test_source.py" in event.source for event in events)


def test_a_kernel_that_a_scanned_remat_returns_unread_is_not_materialised():
    """What `nnx.scan` over `nnx.remat` traces to: the state comes out of the body, unread."""

    def apply(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w), w

        return jax.lax.scan(jax.checkpoint(layer), x, params["w"])[0]

    params = random_like({"w": jnp.zeros((3, 4, 4))}, 1)
    x = jnp.ones((2, 4))
    method = lj.LoRA(targets="w", rank=2, alpha=2, axes=lj.kernel_axes(apply, params, x))
    trainable, frozen = method.init(jax.random.key(0), params)
    trainable = random_like(trainable, 2)
    got = lj.lift(apply, strict=True)(method.bind(trainable, frozen), x)
    assert jnp.allclose(got, apply(method.merge(trainable, frozen), x), atol=1e-5)
