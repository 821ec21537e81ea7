"""Adapters on disk, matrix by matrix, against float64 NumPy on the files' own numbers."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.analysis.adapters import (
    compare_adapters,
    factors_of,
    kernels_of,
    profile_adapter,
    select,
)
from lora_jax.core.errors import RequestError
from lora_jax.peft.factors import AdapterFactors, BaseKernels, Factors, read_factors
from lora_jax.report.adapter_figures import group_by_kind

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"
ADAPTERS, BASES = FIXTURES / "adapters", FIXTURES / "bases"


def numpy_delta(name: str, module: str) -> np.ndarray:
    """s · (B A)ᵀ of a fixture, (d_in, d_out), from its files alone."""
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    tensors = load_file(ADAPTERS / name / "adapter_model.safetensors")
    at = f"base_model.model.{module}."
    table = f"{at}lora_embedding_A" in tensors
    a, b = (
        tensors[f"{at}lora_embedding_{x}" if table else f"{at}lora_{x}.weight"] for x in ("A", "B")
    )
    scale = config["lora_alpha"] / config["r"] ** (0.5 if config["use_rslora"] else 1)
    return scale * (b.astype(np.float64) @ a.astype(np.float64)).T


def weight(base: str, tensor: str) -> np.ndarray:
    return load_file(BASES / base / "model.safetensors")[tensor].astype(np.float64)


def numpy_phi(u1: np.ndarray, u2: np.ndarray) -> np.ndarray:
    return np.array(
        [
            [
                np.linalg.norm(u1[:, :i].T @ u2[:, :j]) ** 2 / min(i, j)
                for j in range(1, u2.shape[1] + 1)
            ]
            for i in range(1, u1.shape[1] + 1)
        ]
    )


@pytest.mark.parametrize(
    "name, module, base, prefix, is_linear",
    [
        ("llama-rslora", "model.layers.1.self_attn.q_proj", "llama", "", True),
        ("llama-embedding", "model.embed_tokens", "llama", "", False),
        ("gpt2-c_attn", "transformer.h.1.attn.c_attn", "gpt2", "", False),
        ("bert-cls", "bert.encoder.layer.0.attention.self.value", "bert_cls", "", True),
        # The base's class has a prefix that the adapter's has not.
        ("bert-bare", "encoder.layer.0.attention.self.query", "bert_cls", "bert.", True),
    ],
)
def test_a_profile_is_float64_numpys(name, module, base, prefix, is_linear):
    adapter = select(read_factors(ADAPTERS / name), f"^{module}$")
    (found,) = profile_adapter(adapter, BaseKernels(BASES / base).kernel)
    delta = numpy_delta(name, module)
    kernel = weight(base, f"{prefix}{module}.weight")
    kernel = kernel.T if is_linear else kernel
    u, s, vh = np.linalg.svd(delta)
    r = found.rank
    np.testing.assert_allclose(found.s, s[:r], rtol=1e-4)
    np.testing.assert_allclose(found.delta_norm, np.linalg.norm(delta), rtol=1e-5)
    np.testing.assert_allclose(found.stable_rank, (s**2).sum() / s[0] ** 2, rtol=1e-4)
    one = found.amplification
    inside = np.linalg.norm(u[:, :r].T @ kernel @ vh[:r].T)
    np.testing.assert_allclose(one.from_delta, inside, rtol=1e-3)
    np.testing.assert_allclose(one.factor, np.linalg.norm(delta) / inside, rtol=1e-3)
    u_w = np.linalg.svd(kernel, full_matrices=False)[0]
    np.testing.assert_allclose(found.kernel_similarity, numpy_phi(u_w, u[:, :r]), atol=1e-4)
    u_t = np.linalg.svd((kernel + delta).T, full_matrices=False)[0]
    u_b = np.linalg.svd(kernel.T, full_matrices=False)[0]
    cosines = np.abs(u_t[:, :10].T @ u_b).max(axis=1)
    assert found.intruders == np.sum(cosines < 0.5)


def test_a_pair_is_float64_numpys():
    one, other = (read_factors(ADAPTERS / name) for name in ("llama-all-linear", "llama-list"))
    pair = compare_adapters(one, other)
    assert {p.module.rpartition(".")[2] for p in pair.profiles} == {"q_proj", "v_proj"}
    assert len(pair.alone) == 10 and not pair.unlike
    for profile in pair.profiles:
        deltas = [numpy_delta(a.name, profile.module) for a in (one, other)]
        svds = [np.linalg.svd(delta) for delta in deltas]
        ranks = [a.factors[profile.module].rank for a in (one, other)]
        inputs = numpy_phi(*(svd[0][:, :r] for svd, r in zip(svds, ranks, strict=True)))
        outputs = numpy_phi(*(svd[2][:r].T for svd, r in zip(svds, ranks, strict=True)))
        np.testing.assert_allclose(profile.input, inputs, atol=1e-4)
        np.testing.assert_allclose(profile.output, outputs, atol=1e-4)
        assert np.all(profile.highest >= profile.expected - 1e-6)
        for axis, count in enumerate(profile.shared):
            bases = (
                svd[0][:, :r] if axis == 0 else svd[2][:r].T
                for svd, r in zip(svds, ranks, strict=True)
            )  # fmt: skip
            wanted = lj.analysis.shared_directions(*bases)
            assert count == wanted.count
            assert profile.shared_above[axis] == pytest.approx(wanted.thresholds[0])
    two = compare_adapters(one, other, num_directions=1)
    assert {profile.ranks for profile in two.profiles} == {(1, 1)}


def test_a_pair_that_shares_a_planted_direction_has_it_counted_and_small_spaces_have_no_count():
    rng = np.random.default_rng(0)
    common = rng.normal(size=(48, 1))

    def one(name, d):
        a = np.c_[common[:d], rng.normal(size=(d, 3))].astype(np.float32)
        return AdapterFactors(name, {"w": Factors(a, rng.normal(size=(4, 48)), 1.0)})

    (profile,) = compare_adapters(one("x", 48), one("y", 48)).profiles
    assert profile.shared == (1, 0)
    (profile,) = compare_adapters(one("x", 7), one("y", 7)).profiles
    assert profile.shared == (None, 0) and profile.shared_above[0] is None


def test_adapters_of_this_project_are_read_as_their_merged_change():
    rng = np.random.default_rng(0)
    params = {
        "w": rng.normal(size=(6, 4)).astype(np.float32),
        "stack": rng.normal(size=(3, 5, 8)).astype(np.float32),
    }
    axes = {
        "stack": lj.KernelAxes(stack=(-3,), in_=(-2,), out=(-1,)),
        "w": lj.KernelAxes(stack=(), in_=(-2,), out=(-1,)),
    }
    rules = [lj.Rule("w", rank=2, alpha=4), lj.Rule("stack", rank=2, alpha=1, slice=(-1, 2, 6))]
    method = lj.LoRA(rules=rules, axes=axes)
    trainable, frozen = method.init(jax.random.key(0), params)
    trainable = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), trainable)
    merged = method.merge(trainable, frozen)
    adapter, kernel = factors_of(method, trainable, params), kernels_of(method, trainable, params)
    names = [n for n in adapter.factors if n.startswith("stack")]
    assert len(names) == 3
    changes = {"w": (merged["w"] - params["w"], params["w"])}
    for layer, name in enumerate(names):
        part = (layer, slice(None), slice(2, 6))
        changes[name] = ((merged["stack"] - params["stack"])[part], params["stack"][part])
    for name, (delta, base) in changes.items():
        own = adapter.factors[name]
        np.testing.assert_allclose(own.scale * own.a @ own.b, delta, atol=1e-5)
        np.testing.assert_array_equal(kernel(adapter, name), base)


def test_weights_lie_as_the_model_has_them_whatever_the_config_says(tmp_path):
    """PEFT writes fan_in_fan_out of the last module it wraps: mixed models cannot be told by it."""
    name = "gpt2-all-linear-dora"
    found = {}
    for flag in (True, False):
        folder = tmp_path / str(flag) / name
        shutil.copytree(ADAPTERS / name, folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        config["fan_in_fan_out"] = flag
        (folder / "adapter_config.json").write_text(json.dumps(config))
        adapter = read_factors(folder)
        kernels = BaseKernels(BASES / "gpt2")
        for module, factors in adapter.factors.items():
            kernel = kernels.kernel(adapter, module)
            assert kernel.shape == factors.shape
            # All of these are Conv1D: (in, out) in the file.
            np.testing.assert_array_equal(kernel, weight("gpt2", f"{module}.weight"))
        found[flag] = list(adapter.factors)
    assert found[True] == found[False] and any("attn.c_proj" in m for m in found[True])


def test_a_tied_heads_kernel_is_the_embedding():
    adapter = read_factors(ADAPTERS / "llama-head")
    table = weight("llama_tied", "model.embed_tokens.weight")
    np.testing.assert_array_equal(
        BaseKernels(BASES / "llama_tied").kernel(adapter, "lm_head"), table.T
    )


def test_a_base_of_nothing_and_a_fresh_adapter_have_no_factor(tmp_path):
    llama = read_factors(ADAPTERS / "llama-list")
    (empty, *_) = profile_adapter(llama, lambda a, m: np.zeros(a.factors[m].shape))
    assert np.isinf(empty.amplification.factor) and empty.amplification.kernel_norm == 0
    zeros = {n: type(f)(f.a, 0 * f.b, f.scale) for n, f in llama.factors.items()}
    fresh = dataclasses.replace(llama, factors=zeros)
    (one, *_) = profile_adapter(fresh, BaseKernels(BASES / "llama").kernel)
    assert one.delta_norm == one.stable_rank == one.amplification.factor == one.intruders == 0
    assert not np.any(compare_adapters(fresh, llama).profiles[0].input)


def test_convolutions_are_left_out_and_named(tmp_path):
    folder = tmp_path / "conv"
    shutil.copytree(ADAPTERS / "llama-list", folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    at = "base_model.model.model.layers.0.conv"
    tensors[f"{at}.lora_A.weight"] = np.ones((4, 3, 2, 2), np.float32)
    tensors[f"{at}.lora_B.weight"] = np.ones((5, 4, 1, 1), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    found = read_factors(folder)
    assert found.skipped == ("model.layers.0.conv",) and len(found.factors) == 4


def test_uni_lora_is_read_as_the_lora_it_amounts_to():
    params = {"w": np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)}
    method = lj.UniLoRA(targets="w", rank=2, dim=5)
    trainable, frozen = method.init(jax.random.key(0), params)
    own = factors_of(method, trainable, params).factors["w"]
    merged = method.merge(trainable, frozen)["w"]
    np.testing.assert_allclose(own.scale * own.a @ own.b, merged - params["w"], atol=1e-6)
    method = lj.IntrinsicDimension(dim=3)
    with pytest.raises(RequestError, match="not low-rank"):
        factors_of(method, method.init(jax.random.key(0), params)[0], params)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda x: (x * 9).astype(np.int8), "the base is quantised"),
        (lambda x: x * np.nan, "NaN or infinity"),
    ],
)
def test_a_base_that_holds_no_weights_is_named(change, says, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(BASES / "llama", folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({n: change(x) for n, x in tensors.items()}, folder / "model.safetensors")
    with pytest.raises(RequestError, match=says):
        profile_adapter(read_factors(ADAPTERS / "llama-list"), BaseKernels(folder).kernel)


def test_layers_come_in_their_order_and_kinds_leave_numbers_out():
    names = ["h.10.q", "h.2.q", "h.2.v1"]
    assert group_by_kind(names) == {"h.*.q": ["h.10.q", "h.2.q"], "h.*.v1": ["h.2.v1"]}
    found = list(read_factors(ADAPTERS / "llama-all-linear").factors)
    assert found == sorted(found)


def test_what_is_asked_in_vain_is_named(tmp_path):
    llama = read_factors(ADAPTERS / "llama-list")
    with pytest.raises(RequestError, match="no weight of 'model.layers.0"):
        profile_adapter(llama, BaseKernels(BASES / "gpt2").kernel)
    with pytest.raises(RequestError, match="no matrix of llama-list matches 'c_attn'"):
        select(llama, "c_attn")
    with pytest.raises(RequestError, match="at least 1"):
        compare_adapters(llama, llama, num_directions=0)
    # A base of the same names and another width.
    folder = tmp_path / "wide"
    shutil.copytree(BASES / "llama", folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: np.zeros((2 * x.shape[0], *x.shape[1:]), x.dtype) for n, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(RequestError, match="made for another base"):
        profile_adapter(llama, BaseKernels(folder).kernel)
    method = lj.FullFineTuning()
    params = {"w": np.ones((3, 2), np.float32)}
    with pytest.raises(RequestError, match="adapts no matrix"):
        factors_of(method, method.init(jax.random.key(0), params)[0], params)
    broken = tmp_path / "nan"
    shutil.copytree(ADAPTERS / "llama-list", broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = np.nan
    save_file(tensors, broken / "adapter_model.safetensors")
    with pytest.raises(RequestError, match="NaN"):
        read_factors(broken)
