"""Without implicit promotion our code computes the same; without jit it says so in one line."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.analysis.subspaces import basis_similarity, expected_similarity
from lora_jax.core.dtypes import promoted
from lora_jax.core.errors import RequestError
from lora_jax.generate import generate_tokens as generate
from lora_jax.models import load_model
from lora_jax.train import train
from lora_jax.train.state import init_state
from lora_jax.train.step import step_function
from lora_jax.train.task import score_classes, score_tokens
from tests.core.adapted import normal

RNG = np.random.default_rng(0)
PARAMS = {"up": normal(RNG, (8, 12)), "down": normal(RNG, (12, 3))}
X = normal(RNG, (2, 8))
METHODS = {
    "lora": lj.LoRA(targets="up", rank=2, dropout=0.1),
    "rows": lj.LoRA(targets="down", rank=2, rows={"up": (1, 3)}),
    "dora": lj.DoRA(targets="up", rank=2),
    "pissa": lj.PiSSA(targets="up", rank=2),
    "vera": lj.VeRA(targets="up", rank=2),
    "lora_xs": lj.LoRAXS(targets="up", rank=2),
    "intrinsic": lj.IntrinsicDimension(targets=".*", dim=6),
    "uni_lora": lj.UniLoRA(targets="up", dim=6, rank=2),
}


@pytest.fixture
def told():
    """Neither dtypes nor ranks promote unless the code says so."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def apply(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


CASES = [(name, "float32") for name in METHODS]
CASES += [(name, "bfloat16") for name in ("lora", "dora", "intrinsic")]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_a_method_s_bound_gradients_and_merged_outputs_need_no_promotion(name, dtype, told):
    method, x = METHODS[name], X.astype(dtype)
    trainable, frozen = method.init(
        jax.random.key(0), {path: w.astype(dtype) for path, w in PARAMS.items()}
    )
    trainable = {
        path: {
            part: v if part in ("key", "layout") else v + jnp.asarray(0.1, v.dtype)
            for part, v in entry.items()
        }
        for path, entry in trainable.items()
    }

    def bound(trainable):
        return lj.lift(apply)(method.bind(trainable, frozen), x).astype(jnp.float32)

    merged = apply(method.merge(trainable, frozen), x).astype(jnp.float32)
    tolerance = 1e-5 if dtype == "float32" else 0.1
    np.testing.assert_allclose(bound(trainable), merged, rtol=0, atol=tolerance)
    gradients = jax.grad(lambda trainable: jnp.sum(bound(trainable)))(trainable)
    assert all(np.isfinite(leaf.astype(np.float32)).all() for leaf in jax.tree.leaves(gradients))


def test_a_step_of_adamw_has_the_same_bits_without_promotion():
    def loss(trainable, frozen, batch, key):
        value = jnp.sum((batch["x"] @ trainable["up"].astype(jnp.float32)) ** 2)
        return value, {"weight": jnp.ones(())}

    tx = optax.adamw(1e-2)
    state = init_state({"up": PARAMS["up"].astype(jnp.bfloat16)}, tx, jax.random.key(0))
    step = step_function(loss, tx)
    expected, _ = step(state, {}, {"x": X})
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found, _ = step(state, {}, {"x": X})
    np.testing.assert_array_equal(found.trainable["up"], expected.trainable["up"])


def test_scores_need_no_promotion_and_labels_may_be_of_any_integer_type(told):
    logits = normal(RNG, (2, 4, 5))
    batch = {
        "input_ids": np.array([[1, 2, 3, 4], [4, 3, 2, 1]], np.int16),
        "loss_mask": np.array([[0, 1, 1, 1], [0, 0, 1, 1]], np.int8),
        "labels": np.array([2, 4], np.int8),
    }
    found = score_tokens(logits, batch)
    log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)
    for row, asked in enumerate(([1, 2, 3], [2, 3])):
        each = [log_p[row, t - 1, batch["input_ids"][row, t]] for t in asked]
        assert float(found.losses[row]) == pytest.approx(-np.mean(each), abs=1e-5)
    right = score_classes(logits[:, 0], batch).correct
    assert right.tolist() == (np.asarray(logits[:, 0]).argmax(-1) == batch["labels"]).tolist()


def test_similarities_of_stacks_need_no_promotion(told):
    bases = jnp.linalg.qr(normal(RNG, (2, 6, 3)))[0]
    np.testing.assert_allclose(
        basis_similarity(bases, bases)[:, -1, -1], np.ones(2), rtol=0, atol=1e-5
    )
    assert expected_similarity(2, 3, 6).shape == (2, 3)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}])
def test_generated_tokens_are_the_same_without_promotion(settings):
    model, ids = load_model("tiny-llama"), np.full((2, 4), 5, np.int32)
    settings = {"max_new_tokens": 3, "eos_token_ids": (), **settings}
    expected = generate(model, model.params, ids, **settings)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = generate(model, model.params, ids, **settings)
    np.testing.assert_array_equal(found.tokens, expected.tokens)


def test_promoted_is_what_jax_promotes_to():
    floats = ("float16", "bfloat16", "float32", "float64")
    for one in floats:
        for other in floats:
            expected = jnp.promote_types(one, other) if one != other else jnp.dtype(one)
            assert promoted(one, other) == expected


def test_without_jit_training_and_sweeping_are_refused_in_one_line(make_config, tmp_path):
    from tests.sweeps import problem

    with jax.disable_jit():
        with pytest.raises(RequestError, match="^JAX_DISABLE_JIT is on") as refused:
            train(make_config(), tmp_path, progress=False)
        with pytest.raises(RequestError, match="^JAX_DISABLE_JIT is on"):
            options = {"num_steps": 2, "axes": problem.AXES, "progress": False}
            lj.sweep(
                problem.loss_fn, problem.base(), problem.batches_of, problem.CELLS[:1], **options
            )
    assert "\n" not in str(refused.value)
