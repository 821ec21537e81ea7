"""Scores of each kind of target, against NumPy in float64."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from lora_jax.core.errors import RequestError
from lora_jax.methods import FullFineTuning, LoRA
from lora_jax.models import load_model
from lora_jax.settings import ModelSettings
from lora_jax.train.evaluate_run import check_completion_format
from lora_jax.train.loss import make_loss
from lora_jax.train.task import (
    NEAR,
    TASKS,
    readout_tokens,
    score_numbers,
    score_tokens,
    task_of,
)
from lora_jax.train.write_results import completion_format

VOCABULARY = 7


def batch_of(seed=0, rows=3, columns=6):
    """Tokens with completions of 2, 3 and no tokens; the first begins at once, one ends the row."""
    generator = np.random.default_rng(seed)
    mask = np.zeros((rows, columns), np.int32)
    mask[0, 1:3] = 1
    mask[1, 3:6] = 1
    return {
        "input_ids": generator.integers(0, VOCABULARY, (rows, columns)).astype(np.int32),
        "attention_mask": np.ones((rows, columns), np.int32),
        "loss_mask": mask,
        "labels": np.zeros(rows, np.int32),
        "weights": mask.sum(1).astype(np.float32),
    }


def reference(logits, batch, smoothing):
    """Per example: mean loss and share of right tokens; token by token, in float64."""
    logits = np.asarray(logits, np.float64)
    losses, right = [], []
    for row in range(len(logits)):
        own = [[], []]
        for t in range(1, logits.shape[1]):
            if batch["loss_mask"][row, t]:
                token, before = batch["input_ids"][row, t], logits[row, t - 1]
                log_p = before - np.log(np.exp(before).sum())
                own[0].append(-(1 - smoothing) * log_p[token] - smoothing * log_p.mean())
                own[1].append(before.argmax() == token)
        losses.append(np.mean(own[0]) if own[0] else 0.0)
        right.append(np.mean(own[1]) if own[1] else 0.0)
    return np.array(losses), np.array(right)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_scores_of_texts_are_those_of_float64_numpy(smoothing):
    batch = batch_of()
    logits = 3 * np.random.default_rng(1).standard_normal((3, 6, VOCABULARY)).astype(np.float32)
    losses, right, predictions = score_tokens(jnp.asarray(logits), batch, smoothing=smoothing)
    wanted = reference(logits, batch, smoothing)
    np.testing.assert_allclose(losses, wanted[0], rtol=2e-6)
    np.testing.assert_allclose(right, wanted[1], rtol=1e-6)
    assert (losses.dtype, right.dtype, predictions) == (jnp.float32, jnp.float32, None)


def bigram(params, ids, mask):
    """A language model of one table: the logits after each token."""
    return params["table"][ids]


def test_loss_of_a_batch_is_the_mean_over_its_completions_tokens():
    """And its gradient is that mean's: by central differences in float64."""
    batch, method = batch_of(), FullFineTuning()
    table = np.random.default_rng(2).standard_normal((VOCABULARY, VOCABULARY))
    params = {"table": jnp.asarray(table, jnp.float32)}
    trainable, frozen = method.init(jax.random.key(0), params)
    loss = make_loss(bigram, method, label_smoothing=0.1, task=TASKS["causal-lm"])
    (value, sums), gradient = jax.value_and_grad(loss, has_aux=True)(
        trainable, frozen, batch, jax.random.key(1)
    )

    def mean_of(table):
        losses, right = reference(table[batch["input_ids"]], batch, 0.1)
        return np.dot(losses, [2, 3, 0]) / 5, np.dot(right, [2, 3, 0])

    assert float(value) == pytest.approx(mean_of(table)[0], rel=1e-6)
    assert (float(sums["weight"]), float(sums["correct"])) == (5, pytest.approx(mean_of(table)[1]))
    before, after = batch["input_ids"][1, 2:5], batch["input_ids"][1, 3:6]
    for i, j in [(0, 0), (3, 2), *zip(before, after, strict=True)]:
        step = np.zeros_like(table)
        step[i, j] = 1e-6
        slope = (mean_of(table + step)[0] - mean_of(table - step)[0]) / 2e-6
        assert float(gradient["table"]["value"][i, j]) == pytest.approx(slope, abs=1e-6)


def test_neither_prompts_nor_padding_are_learnt():
    """The logits of positions before other tokens than a completion's have no gradient."""
    batch = batch_of()
    logits = jnp.asarray(np.random.default_rng(3).standard_normal((3, 6, VOCABULARY)), jnp.float32)
    gradient = jax.grad(lambda x: score_tokens(x, batch, smoothing=0.1).losses.sum())(logits)
    learnt = np.asarray(gradient != 0).any(-1)
    np.testing.assert_array_equal(learnt, np.roll(batch["loss_mask"], -1, 1) == 1)


def readout_setting(dtype=jnp.float32, batch_size=3, time=7, width=5):
    rng = np.random.default_rng(4)
    h = jnp.asarray(rng.standard_normal((batch_size, time, width)), dtype)
    kernel = jnp.asarray(rng.standard_normal((width, VOCABULARY)), dtype)
    batch = {
        "input_ids": rng.integers(0, VOCABULARY, (batch_size, time)).astype(np.int32),
        "loss_mask": rng.integers(0, 2, (batch_size, time)).astype(np.int32),
    }
    batch["loss_mask"][-1] = 0
    return h, kernel, batch


@pytest.mark.parametrize(
    "chunk", [2, 7, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 6, 100, 0))]
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_loss_in_chunks_is_the_plain_one(chunk, smoothing):
    """Value and gradients in states and head, float32, to 1e-6 of their largest."""
    h, kernel, batch = readout_setting()
    weights = jnp.array([2.0, 0.5, 1.0])

    def plain(h, kernel):
        scores = score_tokens(h @ kernel, batch, smoothing=smoothing)
        return jnp.dot(weights, scores.losses), scores

    def in_chunks(h, kernel):
        scores = readout_tokens(lambda h: h @ kernel, h, batch, smoothing=smoothing, chunk=chunk)
        return jnp.dot(weights, scores.losses), scores

    found, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(h, kernel)
        for f in (in_chunks, plain)
    )
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, atol=1e-6 * float(jnp.abs(other).max()) + 1e-12)
    assert float(found[0][0]) > 0.1


def test_a_loss_in_chunks_of_float64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    try:
        h, kernel, batch = readout_setting(jnp.float64)
        found = readout_tokens(lambda h: h @ kernel, h, batch, chunk=2)
        expected = score_tokens(h @ kernel, batch)
        assert found.losses.dtype == jnp.float64
        np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-12)
        np.testing.assert_allclose(found.correct, expected.correct, rtol=1e-6)
    finally:
        jax.config.update("jax_enable_x64", before)


def test_no_more_logits_are_alive_than_a_chunk_has():
    """Compiled for 2,048 positions of 8,192 words: temporaries without chunks, and with."""
    ids = jax.ShapeDtypeStruct((1, 2048), jnp.int32)
    h = jax.ShapeDtypeStruct((1, 2048, 16), jnp.float32)
    kernel = jax.ShapeDtypeStruct((16, 8192), jnp.float32)

    def temporaries(chunk):
        def loss(h, kernel, ids, mask):
            batch = {"input_ids": ids, "loss_mask": mask}
            return readout_tokens(lambda h: h @ kernel, h, batch, chunk=chunk).losses.sum()

        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(h, kernel, ids, ids).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 2048 * 8192
    assert temporaries(2048) > logits
    assert temporaries(64) < logits / 4


@pytest.mark.parametrize("name", ["tiny-gpt2", pytest.param("tiny-llama", marks=pytest.mark.slow)])
def test_a_models_loss_in_chunks_is_the_plain_one(name):
    """Through `lift`, with an adapter on the tied table that gives the logits."""
    model = load_model(name)
    method = LoRA(
        targets="q,v,embed",
        rank=2, alpha=4, axes=model.axes, aliases=model.aliases,
    )  # fmt: skip
    trainable, frozen = method.init(jax.random.key(0), model.params)
    drawn = iter(jax.random.split(jax.random.key(1), 2 * len(trainable)))
    trainable = jax.tree.map(lambda x: 0.1 * jax.random.normal(next(drawn), x.shape), trainable)
    rng = np.random.default_rng(5)
    batch = {
        "input_ids": rng.integers(0, 200, (2, 9)).astype(np.int32),
        "attention_mask": np.ones((2, 9), np.int32),
        "loss_mask": rng.integers(0, 2, (2, 9)).astype(np.int32),
        "weights": np.array([4.0, 3.0], np.float32),
    }
    task = dataclasses.replace(TASKS["causal-lm"], readout=readout_tokens)
    ways = [{"task": TASKS["causal-lm"]}, {"task": task, "loss_chunk": 4}, {"task": task}]
    (plain, *others) = (
        jax.value_and_grad(make_loss(model.apply, method, **way), has_aux=True)(
            trainable, frozen, batch, jax.random.key(2)
        )
        for way in ways
    )
    for other in others:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-5), other, plain
        )
    with pytest.raises(RequestError, match="loss_chunk=-1"):
        make_loss(model.apply, method, task=task, loss_chunk=-1)


def test_scores_of_numbers_are_squared_errors():
    outputs = np.array([[1.0], [2.0], [-3.0]], np.float32)
    labels = np.array([1.0 + NEAR, 2.75, 4.0], np.float32)
    losses, near, predictions = score_numbers(jnp.asarray(outputs), {"labels": labels})
    np.testing.assert_allclose(losses, [0.25, 0.5625, 49.0])
    assert near.tolist() == [True, False, False]
    np.testing.assert_array_equal(predictions, outputs[:, 0])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"head": "causal_lm"}, "nearest: 'causal-lm'"),
        ({"head": "regression", "num_labels": 3}, "model.num_labels=3, but a regression has one"),
    ],
)
def test_head_that_cannot_be_is_refused(settings, words):
    with pytest.raises(RequestError, match=words):
        task_of(ModelSettings(**settings))


def test_numbers_are_not_smoothed():
    with pytest.raises(RequestError, match="numbers are not smoothed"):
        make_loss(bigram, FullFineTuning(), label_smoothing=0.1, task=TASKS["regression"])


def test_head_is_classification_where_the_config_is_silent():
    said = ModelSettings(head="classification")
    assert task_of(ModelSettings()) is task_of(said) is TASKS["classification"]


def test_run_of_the_first_completion_format_is_refused_where_its_ids_differ():
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "a": 1}, "<s>"))
    model = types.SimpleNamespace(tokenizer=tokenizer)
    settings = {"head": "causal-lm"}
    check_completion_format({}, model, settings, "run")  # the ids are what they always were
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    with pytest.raises(RequestError, match="run was trained by an earlier version"):
        check_completion_format({}, model, settings, "run")
    check_completion_format(completion_format(model, settings), model, settings, "run")
    check_completion_format({}, model, {"head": "classification"}, "run")
