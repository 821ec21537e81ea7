import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.methods import FullFineTuning, LoRA
from lora_jax.models import load_model
from lora_jax.train.loss import cross_entropy, make_loss, weighted_mean


def reference(logits, labels, smoothing):
    """Cross-entropy with the smoothed distribution written out, in float64."""
    logits = np.asarray(logits, np.float64)
    log_p = logits - np.log(np.sum(np.exp(logits), -1, keepdims=True))
    classes = logits.shape[-1]
    q = (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes
    return -np.sum(q * log_p, -1)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_label_smoothing_is_that_of_float64_numpy(smoothing, dtype):
    generator = np.random.default_rng(0)
    logits = jnp.asarray(5 * generator.standard_normal((6, 4)), dtype)
    labels = np.array([0, 1, 2, 3, 0, 1])
    found = cross_entropy(logits, jnp.asarray(labels), smoothing=smoothing)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(
        found, reference(logits.astype(jnp.float32), labels, smoothing), rtol=2e-6, atol=1e-6
    )


def test_mean_counts_each_row_by_its_weight():
    values, weights = np.array([1.0, 2.0, 4.0]), np.array([1.0, 0.5, 0.0])
    assert float(weighted_mean(values, weights)) == pytest.approx(2.0 / 1.5)
    assert float(weighted_mean(values, np.zeros(3))) == 0.0


@pytest.mark.slow  # that packed cells drop as alone ones is among the fast tests
def test_the_models_own_dropout_acts_in_training_where_asked_and_never_without_a_key():
    model = load_model("tiny-roberta", head="classification", num_labels=2)
    method = LoRA(targets="q,v", rank=2, dropout=0.5, aliases=model.aliases)
    trainable, frozen = method.init(jax.random.key(0), model.params)
    ids = np.arange(24).reshape(3, 8) % 50 + 5
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": np.array([0, 1, 1])}
    batch["weights"] = np.ones(3, np.float32)
    key = jax.random.key(4)

    losses = {on: jax.jit(make_loss(model.apply, method, model_dropout=on)) for on in (0, 1)}

    def value(on, key):
        return float(losses[on](trainable, frozen, batch, key)[0])

    # B is zero, so that the adapters' own dropout changes nothing: all of it is the model's.
    assert value(False, key) == pytest.approx(value(True, None), abs=1e-6)
    dropped = [value(True, jax.random.key(seed)) for seed in (4, 4, 5)]
    assert dropped[0] == dropped[1] != dropped[2]
    assert abs(dropped[0] - value(False, key)) > 1e-4


def test_rows_of_no_weight_change_neither_loss_nor_gradient():
    def apply(params, ids, mask):
        return params["table"][ids].mean(1)

    params = {"table": jax.random.normal(jax.random.key(0), (7, 3))}
    method = FullFineTuning()
    trainable, frozen = method.init(jax.random.key(1), params)
    loss = make_loss(apply, method, label_smoothing=0.1)
    loss = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def results(ids, labels, weights):
        batch = {
            "input_ids": jnp.asarray(ids),
            "attention_mask": jnp.ones_like(jnp.asarray(ids)),
            "labels": jnp.asarray(labels),
            "weights": jnp.asarray(weights, jnp.float32),
        }
        return loss(trainable, frozen, batch, jax.random.key(2))

    (value, sums), gradient = results([[1, 2], [3, 4]], [0, 2], [1, 1])
    (padded, padded_sums), padded_gradient = results([[1, 2], [3, 4], [6, 6]], [0, 2, 1], [1, 1, 0])
    np.testing.assert_allclose(padded, value, rtol=1e-6)
    assert {k: float(v) for k, v in sums.items()} == {k: float(v) for k, v in padded_sums.items()}
    wanted, found = gradient["table"]["value"], padded_gradient["table"]["value"]
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-8)
    assert not np.any(found[6])


def test_smoothing_out_of_range_is_refused():
    with pytest.raises(RequestError, match="label_smoothing=1.0"):
        make_loss(lambda params, ids, mask: ids, FullFineTuning(), label_smoothing=1.0)
