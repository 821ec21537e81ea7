"""Adapters that peft wrote, against peft's logits and gradients (by make_peft_fixtures.py)."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.io.safetensors import read_tensors
from lora_jax.peft.load import load_adapter, save_adapter

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "peft"
CASES = sorted(path.name for path in (FOLDER / "adapters").iterdir())
EXPECTED = read_tensors(FOLDER / "expected.safetensors")
# Compiling is what these tests cost: the fast suite has one of each kind, most without gradients.
FAST_GRADIENTS = {
    "llama-patterns", "llama-dora-rslora", "llama-embedding-dora", "gpt2-c_attn", "roberta-cls",
}  # fmt: skip
FAST_LOGITS = [
    "llama-rslora", "llama-layers-pattern", "llama-bias-all", "llama-save-head", "llama-cls",
    "llama-tied-embedding", "gpt2-all-linear-dora", "gpt2-tied-embedding", "gpt2-position",
    "bert-cls-all", "qwen2-list",
]  # fmt: skip


def fast_few(cases, fast):
    """All cases, those outside of `fast` marked slow."""
    return [c if c in fast else pytest.param(c, marks=pytest.mark.slow) for c in cases]


def compiled(function):
    """`jax.jit` without the compiler's optimisations: the programs are many, and run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def base_of(case: str) -> str:
    config = json.loads((FOLDER / "adapters" / case / "adapter_config.json").read_text())
    return config["base_model_name_or_path"]


def load(case: str, **options):
    base = base_of(case)
    head = "classification" if base.endswith("cls") else None
    model = lj.load_model(FOLDER / "bases" / base, head=head, tokenizer=False, **options)
    return model, *load_adapter(FOLDER / "adapters" / case, model)


def batch_of(case: str):
    base = base_of(case)
    return EXPECTED[f"{base}/input_ids"], EXPECTED[f"{base}/attention_mask"]


def logits_of(model, method, trainable, case: str, params=None):
    """Logits, and where they are of real positions."""
    ids, mask = batch_of(case)
    apply, params = lj.lift(model.apply), model.params if params is None else params
    logits = compiled(lambda t: apply(method.bind(t, params), ids, mask))(trainable)
    real = mask[..., None] if logits.ndim == 3 else np.ones((len(ids), 1))
    return np.asarray(logits), np.broadcast_to(real, logits.shape) != 0


def gradients_of(model, method, trainable, case: str):
    """`logits_of`, and gradients of the fixture's loss: a random sum of the logits."""
    ids, mask = batch_of(case)
    weights = EXPECTED[f"{case}/weights"]
    real = mask[..., None] if weights.ndim == 3 else np.ones_like(weights)

    def loss(trainable):
        logits = lj.lift(model.apply)(method.bind(trainable, model.params), ids, mask)
        return jnp.sum(logits * weights * real), logits

    gradients, logits = compiled(jax.grad(loss, has_aux=True))(trainable)
    return np.asarray(logits), np.broadcast_to(real, logits.shape) != 0, gradients


def assert_equal_peft(logits, real, case: str):
    """To 5e-5; `real` is where the logits are of real positions."""
    expected = EXPECTED[f"{case}/logits"]
    np.testing.assert_allclose(logits[real], expected[real], rtol=0, atol=5e-5)


@pytest.mark.parametrize("case", FAST_LOGITS)
def test_logits_equal_peft(case):
    assert_equal_peft(*logits_of(*load(case), case), case)


@pytest.mark.parametrize("case", fast_few(CASES, FAST_GRADIENTS))
def test_logits_and_gradients_equal_peft(case, tmp_path):
    model, method, trainable = load(case)
    logits, real, gradients = gradients_of(model, method, trainable, case)
    assert_equal_peft(logits, real, case)
    # The names of the gradients come from writing them as an adapter: layouts only, no scales.
    save_adapter(tmp_path / "gradients", method, trainable | adapters(gradients), model)
    found = read_tensors(tmp_path / "gradients" / "adapter_model.safetensors")
    wanted = {k: v for k, v in EXPECTED.items() if k.startswith(f"{case}/grad.")}
    assert wanted
    for key, expected in wanted.items():
        name = key.removeprefix(f"{case}/grad.").removesuffix(".weight")
        name = name if name.endswith("vector") or "embedding" in name else f"{name}.weight"
        got, scale = found[f"base_model.model.{name}"], np.abs(expected).max()
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3 * scale, err_msg=key)


def adapters(tree):
    return {name: entry for name, entry in tree.items() if "a" in entry}


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_keeps_every_byte_and_scale(case, tmp_path):
    model, method, trainable = load(case)
    save_adapter(tmp_path / "again", method, trainable, model)
    first = read_tensors(FOLDER / "adapters" / case / "adapter_model.safetensors")
    again = read_tensors(tmp_path / "again" / "adapter_model.safetensors")
    assert first.keys() == again.keys()
    for name, array in first.items():
        assert array.dtype == again[name].dtype
        np.testing.assert_array_equal(array, again[name], err_msg=name)
    other, entries = load_adapter(tmp_path / "again", model)
    for one, two in zip(other.table(model.params), method.table(model.params), strict=True):
        assert (one.path, one.rank) == (two.path, two.rank)
        assert one.scale == pytest.approx(two.scale, rel=1e-12) if one.rank else two.scale is None
    jax.tree.map(np.testing.assert_array_equal, entries, trainable)


# Each family, mixed ranks, DoRA, biases, whole modules: what stacking could get wrong.
STACKED = [
    "llama-patterns", "llama-layers", "llama-dora", "llama-rslora", "llama-bias-all",
    "llama-save-head", "llama-tied-embedding", "gpt2-all-linear-dora", "gpt2-bias-all",
]  # fmt: skip


@pytest.mark.parametrize("case", fast_few(STACKED, {"llama-patterns", "gpt2-bias-all"}))
def test_one_file_serves_stacked_layers_too(case, tmp_path):
    model, method, trainable = load(case, scan_layers=True)
    assert_equal_peft(*logits_of(model, method, trainable, case), case)
    # Written from the stack, it serves the plain model.
    save_adapter(tmp_path / "again", method, trainable, model)
    plain, _, _ = load(case)
    method, trainable = load_adapter(tmp_path / "again", plain)
    assert_equal_peft(*logits_of(plain, method, trainable, case), case)


@pytest.mark.parametrize("case", ["llama-tied-embedding", "gpt2-tied-embedding"])
def test_an_adapter_of_a_tied_table_merges_once_the_head_is_untied(case):
    model, method, trainable = load(case)
    with pytest.raises(lj.RequestError, match="untie=True"):
        method.merge(trainable, model.params)
    model, method, trainable = load(case, untie=True)
    merged = method.merge(trainable, model.params)
    assert_equal_peft(*logits_of(model, method, {}, case, merged), case)
