import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.methods import HeadOnly
from lora_jax.train.evaluate import evaluate, make_scores

VOCABULARY, CLASSES = 9, 3


def apply(params, ids, mask):
    kept = mask[..., None].astype(jnp.float32)
    pooled = (params["table"][ids] * kept).sum(1) / kept.sum(1)
    return pooled @ params["head"]["kernel"]


@pytest.fixture(scope="module")
def classifier():
    generator = np.random.default_rng(0)
    params = {
        "table": jnp.asarray(generator.standard_normal((VOCABULARY, 4)), jnp.float32),
        "head": {"kernel": jnp.asarray(generator.standard_normal((4, CLASSES)), jnp.float32)},
    }
    method = HeadOnly()
    trainable, frozen = method.init(jax.random.key(0), params)
    return make_scores(apply, method), trainable, frozen, params


def make_batches(weights_of):
    generator = np.random.default_rng(1)
    for number, weights in enumerate(weights_of):
        size = len(weights)
        yield {
            "input_ids": generator.integers(0, VOCABULARY, (size, 5)).astype(np.int32),
            "attention_mask": np.ones((size, 5), np.int32),
            "labels": generator.integers(0, CLASSES, size).astype(np.int32),
            "weights": np.asarray(weights, np.float32),
            "index": np.arange(size) + 100 * number,
        }


def test_evaluation_is_that_of_float64_numpy(classifier):
    scores, trainable, frozen, params = classifier
    weights_of = [[1, 1, 1, 1], [1, 0.5, 0, 0]]
    result = evaluate(scores, trainable, frozen, make_batches(weights_of))
    table, kernel = (np.asarray(x, np.float64) for x in (params["table"], params["head"]["kernel"]))
    losses, correct, labels, index, weights = [], [], [], [], []
    for batch in make_batches(weights_of):
        logits = table[batch["input_ids"]].mean(1) @ kernel
        for row in range(len(logits)):
            if batch["weights"][row]:
                label = batch["labels"][row]
                losses.append(np.log(np.exp(logits[row]).sum()) - logits[row, label])
                correct.append(logits[row].argmax() == label)
                labels.append(label)
                index.append(batch["index"][row])
                weights.append(batch["weights"][row])
    assert result.num_examples == 6
    np.testing.assert_allclose(result.losses, losses, rtol=1e-5)
    np.testing.assert_array_equal(result.correct, correct)
    np.testing.assert_array_equal(result.labels, labels)
    np.testing.assert_array_equal(result.index, index)
    assert result.loss == pytest.approx(np.dot(losses, weights) / np.sum(weights), rel=1e-5)
    assert result.accuracy == pytest.approx(np.dot(correct, weights) / np.sum(weights))
    kinds = (result.losses, result.correct, result.labels, result.index)
    assert [part.dtype.name for part in kinds] == ["float32", "bool", "int32", "int64"]


@pytest.mark.parametrize("weights_of", [[], [[0, 0]]])
def test_nothing_to_evaluate_is_an_error(classifier, weights_of):
    scores, trainable, frozen, _ = classifier
    with pytest.raises(RequestError, match="nothing to evaluate"):
        evaluate(scores, trainable, frozen, make_batches(weights_of))
