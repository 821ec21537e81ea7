"""An adapted value used outside `lift`, and a hole used unbound, name the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.errors import RequestError

PARAMS = {"w": jnp.ones((4, 4)), "head": jnp.ones((4, 2))}
X = jnp.ones((3, 4))
USES = {
    "matmul": lambda w: X @ w,
    "numpy matmul": lambda w: np.ones((3, 4)) @ w,
    "left of matmul": lambda w: w @ X.T,
    "plus": lambda w: 1.0 + w,
    "times": lambda w: w * 2,
    "minus": lambda w: -w,
    "compared": lambda w: w < 1,
    "indexed": lambda w: w[0],
    "transposed": lambda w: w.T,
    "cast": lambda w: w.astype(jnp.bfloat16),
    "updated": lambda w: w.at[0].set(0.0),
    "iterated": lambda w: list(w),
    "jnp.dot": lambda w: jnp.dot(X, w),
    "jnp.einsum": lambda w: jnp.einsum("bi,ij->bj", X, w),
    "jnp.asarray": jnp.asarray,
    "np.asarray": np.asarray,
    "under jit": lambda w: jax.jit(lambda w: X @ w)(w),
    "a product with precision": lambda w: jnp.matmul(X, w, precision="highest"),
}


def bound(kind):
    method = lj.DoRA if kind == "dora" else lj.LoRA
    params = lj.quantize(PARAMS, "w") if kind == "nf4" else PARAMS
    if kind == "nf4":
        return params["w"]
    method = method(targets="w", rank=1, alpha=1, train="head")
    return method.bind(*method.init(jax.random.key(0), params))["w"]


@pytest.mark.parametrize("kind", ["lora", "dora", "nf4"])
@pytest.mark.parametrize("use", USES)
def test_an_adapted_value_outside_lift_names_lift(use, kind):
    value = bound(kind)
    with pytest.raises(RequestError, match=r"'w' is a .* call lora_jax.lift\(apply\)"):
        USES[use](value)


@pytest.mark.parametrize("use", sorted(set(USES) - {"under jit"}))
def test_a_hole_names_bind(use):
    method = lj.LoRA(targets="w", rank=1, alpha=1, train="head")
    hole = method.init(jax.random.key(0), PARAMS)[1]["head"]
    with pytest.raises(RequestError, match="method.bind"):
        USES[use](hole)


def test_an_adapted_value_answers_hasattr_and_equality_as_an_object_does():
    value = bound("lora")
    assert not hasattr(value, "aval") and value.shape == (4, 4)
    assert jax.tree.structure(value) == jax.tree.structure(bound("lora"))
