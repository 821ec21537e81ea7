"""Properties of the encoder that hold whatever its weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.models import load_model
from lora_jax.models.functional import flatten, unflatten


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-bert", head="classification", num_labels=3)


@pytest.fixture(scope="module")
def apply(model):
    return jax.jit(model.apply, static_argnames="output_hidden_states")


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    mask = (np.arange(7) < np.array([[7], [4], [2]])).astype(np.int32)
    return {"input_ids": rng.integers(5, 100, (3, 7)) * mask, "attention_mask": mask}


def run(model, batch, params=None):
    """Output and hidden states, compiled: op by op takes longer than the compiler."""
    apply = jax.jit(model.apply, static_argnames="output_hidden_states")
    return apply(params or model.params, **batch, output_hidden_states=True)


def test_padding_changes_nothing(model, apply, batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    logits = apply(model.params, ids, mask)
    for row, length in enumerate((7, 4, 2)):
        alone = apply(model.params, ids[row : row + 1, :length], mask[row : row + 1, :length])
        np.testing.assert_allclose(logits[row], alone[0], atol=1e-6)
    other_words = np.where(mask == 1, ids, 42)
    np.testing.assert_array_equal(apply(model.params, other_words, mask), logits)


def test_a_row_of_padding_alone_is_finite_in_output_and_gradient(model, batch):
    mask = batch["attention_mask"] * np.array([[1], [1], [0]])
    loss = lambda p: (model.apply(p, batch["input_ids"], mask) ** 2).sum()  # noqa: E731
    value, gradient = jax.jit(jax.value_and_grad(loss))(model.params)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradient))


def test_every_parameter_reaches_the_logits(model, batch):
    types = np.array([[0, 0, 0, 1, 1, 1, 1]] * 3)

    def loss(params):
        logits = model.apply(params, **batch, token_type_ids=types)
        return (logits * jnp.arange(1.0, 10.0).reshape(3, 3)).sum()

    gradient = flatten(jax.jit(jax.grad(loss))(model.params))
    # A key's bias shifts all scores of a query alike, which the softmax does not see.
    unmoved = {path for path, g in gradient.items() if np.abs(g).max() < 1e-5}
    assert unmoved == {f"encoder/layers/{i}/attention/key/bias" for i in range(2)}


def test_dropout_acts_only_with_a_key_and_is_a_function_of_it(model, apply, batch):
    run = lambda key: np.asarray(apply(model.params, **batch, dropout_key=key))  # noqa: E731
    one, two = run(jax.random.key(1)), run(jax.random.key(2))
    assert np.abs(one - two).max() > 1e-3
    assert np.abs(one - run(None)).max() > 1e-3
    np.testing.assert_array_equal(one, run(jax.random.key(1)))
    np.testing.assert_array_equal(run(None), run(None))


def test_dropout_keeps_the_mean(model, apply, batch):
    keys = jax.random.split(jax.random.key(0), 400)
    run = jax.jit(
        lambda key: model.apply(model.params, **batch, output_hidden_states=True, dropout_key=key)[
            1
        ][0]
    )
    runs = np.asarray(jax.vmap(run)(keys))
    plain = apply(model.params, **batch, output_hidden_states=True)[1][0]
    # The embeddings' output is where nothing lies between the dropout and the comparison.
    spread = runs.std(0) / np.sqrt(len(keys))
    assert (np.abs(runs.mean(0) - plain) <= 5 * spread + 1e-6).all()


def test_bfloat16_stays_bfloat16_and_near_float32(batch):
    wide = load_model("tiny-bert")
    narrow = load_model("tiny-bert", dtype="bfloat16")
    assert {x.dtype.name for x in jax.tree.leaves(narrow.params)} == {"bfloat16"}
    output, states = run(narrow, batch)
    assert {x.dtype.name for x in (output, *states)} == {"bfloat16"}
    expected = np.asarray(run(wide, batch)[0])
    real = batch["attention_mask"] == 1
    error = np.abs(np.asarray(output, np.float32) - expected)[real]
    assert error.max() < 0.1 and error.mean() < 0.02


def test_a_float32_head_on_a_bfloat16_base(batch):
    model = load_model("tiny-bert", head="classification", num_labels=2, dtype="bfloat16")
    assert model.params["head"]["kernel"].dtype == jnp.float32
    assert run(model, batch)[0].dtype == jnp.float32


def test_a_float32_bias_does_not_widen_a_bfloat16_stream(batch):
    model = load_model("tiny-bert", dtype="bfloat16")
    flat = flatten(model.params)
    flat = {p: x.astype(jnp.float32) if p.endswith("/bias") else x for p, x in flat.items()}
    _, states = run(model, batch, unflatten(flat))
    assert {x.dtype.name for x in states} == {"bfloat16"}


def test_params_may_be_mapped_over(model, apply, batch):
    second = jax.tree.map(lambda x: np.float32(1.1) * np.asarray(x), model.params)
    stacked = jax.tree.map(lambda *two: np.stack(two), model.params, second)
    both = jax.jit(jax.vmap(lambda p: model.apply(p, **batch)))(stacked)
    np.testing.assert_allclose(both[0], apply(model.params, **batch), atol=2e-5)
    np.testing.assert_allclose(both[1], apply(second, **batch), atol=2e-5)


def test_an_id_outside_the_vocabulary_gives_nan_not_another_word(model, apply, batch):
    ids = batch["input_ids"].copy()
    ids[0, 0] = 5000
    logits = np.asarray(apply(model.params, ids, batch["attention_mask"]))
    assert np.isnan(logits[0]).all() and np.isfinite(logits[1:]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: (
                b | {"input_ids": np.zeros((3, 200), int), "attention_mask": np.ones((3, 200))}
            ),
            "200 tokens.*128 positions",
        ),
        (
            lambda b: b | {"attention_mask": b["attention_mask"][:, :5]},
            r"attention_mask has shape \(3, 5\)",
        ),
        (
            lambda b: b | {"token_type_ids": np.zeros((3, 1), int)},
            r"token_type_ids has shape \(3, 1\)",
        ),
        (lambda b: b | {"input_ids": b["input_ids"][0]}, r"\(batch, time\)"),
        (lambda b: b | {"input_ids": b["input_ids"].astype(np.float32)}, "float32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(model, batch, change, message):
    with pytest.raises(RequestError, match=message):
        model.apply(model.params, **change(batch))


def test_params_with_a_hole_or_a_stranger_are_named(model, batch):
    flat = flatten(model.params)
    path = "encoder/layers/1/mlp/output/kernel"
    without = unflatten({p: x for p, x in flat.items() if p != path})
    with pytest.raises(RequestError, match=path):
        model.apply(without, **batch)
    with pytest.raises(RequestError, match=path):
        model.apply(unflatten(flat | {path: None}), **batch)
    with pytest.raises(RequestError, match="encoder/oddity"):
        model.apply(unflatten(flat | {"encoder/oddity": jnp.ones(2)}), **batch)


def test_aliases_name_the_kernels(model):
    import re

    def count(alias):
        return sum(bool(re.fullmatch(model.aliases[alias], p)) for p in flatten(model.params))

    counts = {alias: count(alias) for alias in model.aliases}
    per_layer = dict.fromkeys(("q", "k", "v", "o", "up", "down"), 2)
    assert counts == {**per_layer, "embed": 1, "head": 1, "all-linear": 12}
