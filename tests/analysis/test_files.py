"""Adapters in files without JAX: scales, formats and ranks against float64 NumPy's dense ΔW."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lora_jax import analysis
from lora_jax.analysis import adapters
from lora_jax.analysis.profiles import delta_of, with_gains
from lora_jax.core.errors import RequestError
from lora_jax.peft.factors import AdapterFactors, Factors, read_factors
from lora_jax.peft.kohya import read_kohya

FIXTURES = Path(__file__).parents[1] / "fixtures" / "peft"


def factors_of(rng, out, into, r):
    """lora_A and lora_B as files have them, float32."""
    shapes = ((r, into), (out, r))
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def write_peft(folder, modules, **config):
    """`{module: (A, B)}` as a folder in PEFT's format."""
    tensors = {}
    for module, (a, b) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    named = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q", "v"]}
    (folder / "adapter_config.json").write_text(json.dumps(named | config))
    return folder


def dense(a, b, scale):
    return scale * (b.astype(np.float64) @ a.astype(np.float64))


def as_dense(factors):
    a, b = (np.asarray(x, np.float64) for x in (factors.a, factors.b))
    return (factors.scale * a @ b).T


def test_scales_are_pefts_by_module_with_rslora_and_patterns(tmp_path):
    """Two adapters that differ in use_rslora alone differ by √r, not by nothing."""
    rng = np.random.default_rng(0)
    modules = {"l.0.q": factors_of(rng, 9, 7, 4), "l.1.q": factors_of(rng, 9, 7, 4)}
    modules["l.0.v"] = factors_of(rng, 5, 7, 2)
    patterns = {"rank_pattern": {"v": 2}, "alpha_pattern": {r"l\.1\.q": 3.0}}
    found = {}
    for name, rslora in (("plain", False), ("rs", True)):
        folder = write_peft(tmp_path / name, modules, use_rslora=rslora, **patterns)
        profiles = analysis.profile_adapter(read_factors(folder))
        found[name] = {p.module: p for p in profiles}
        for module, (a, b) in modules.items():
            alpha, r = 3.0 if module == "l.1.q" else 8.0, len(a)
            wanted = dense(a, b, alpha / (r**0.5 if rslora else r))
            assert found[name][module].delta_norm == pytest.approx(np.linalg.norm(wanted), 1e-9)
    for module, (a, _) in modules.items():
        ratio = found["rs"][module].delta_norm / found["plain"][module].delta_norm
        assert ratio == pytest.approx(len(a) ** 0.5)


@pytest.mark.parametrize("shape", [(40, 30, 6), (30, 40, 1), (5, 6, 9)])
def test_singular_values_and_ranks_are_those_of_the_dense_change(shape):
    out, into, r = shape
    rng = np.random.default_rng(r)
    a, b = factors_of(rng, out, into, r)
    a *= np.exp(-np.arange(r)).astype(np.float32)[:, None]
    (found,) = analysis.profile_adapter(AdapterFactors("x", {"w": Factors(a.T, b.T, 0.5)}))
    s = np.linalg.svd(dense(a, b, 0.5), compute_uv=False)[: len(found.s)]
    np.testing.assert_allclose(found.s, s, rtol=1e-6, atol=1e-6 * s[0])
    p = s[s > 0] / s.sum()
    share = np.cumsum(s**2) / np.sum(s**2)
    assert found.stable_rank == pytest.approx(np.sum(s**2) / s[0] ** 2, 1e-8)
    assert found.entropy_rank == pytest.approx(np.exp(-np.sum(p * np.log(p))), 1e-6)
    assert found.energy_rank == np.argmax(share >= 0.9) + 1
    assert found.energy_rank_99 == np.argmax(share >= 0.99) + 1
    svd = delta_of(Factors(a.T, b.T, -0.5))
    np.testing.assert_allclose((svd.u * svd.s) @ svd.v.T, dense(a, b, -0.5).T, atol=1e-9)


def test_files_of_kohyas_scripts_are_scaled_by_their_own_alphas(tmp_path):
    rng = np.random.default_rng(1)
    names = {
        "lora_unet_down_blocks_10_attn1_to_q": 2.0,
        "lora_unet_down_blocks_2_attn1_to_q": None,
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": 1.0,
        "lora_unet_mid_block_proj_in": 4.0,
    }
    tensors, wanted = {}, {}
    for name, alpha in names.items():
        down, up = factors_of(rng, 9, 7, 4)
        wanted[name] = dense(down, up, 1.0 if alpha is None else alpha / 4)
        if name.endswith("proj_in"):  # a convolution of one point
            down, up = down[:, :, None, None], up[:, :, None, None]
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        if alpha is not None:
            tensors[f"{name}.alpha"] = np.array(alpha, np.float32)
    tensors["lora_unet_conv.lora_down.weight"] = np.ones((4, 3, 3, 3), np.float32)
    tensors["lora_unet_conv.lora_up.weight"] = np.ones((5, 4, 1, 1), np.float32)
    save_file(tensors, tmp_path / "style.safetensors")
    found = read_kohya(tmp_path / "style.safetensors")
    assert found.name == "style" and found.skipped == ("lora_unet_conv",)
    assert found.factors.keys() == wanted.keys()
    blocks = [name for name in found.factors if "down_blocks" in name]
    assert "blocks_2_" in blocks[0] and "blocks_10_" in blocks[1]
    for name, delta in wanted.items():
        np.testing.assert_allclose(as_dense(found.factors[name]), delta, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("m.lora_up.weight"), "lacks its lora_up"),
        (lambda t: t.update({"m.lora_up.weight": t["m.lora_up.weight"].T.copy()}), "no factors"),
        (lambda t: t.update({"m.alpha": np.array([1, 2], np.float32)}), "one positive number"),
        (lambda t: t.update({"m.alpha": np.array(-1, np.float32)}), "one positive number"),
        (lambda t: t.update({"m.hada_w1_a": np.ones(3, np.float32)}), "give an adapter as kohya"),
        (lambda t: t.update({"base_model.model.m.lora_A.weight": np.ones(3)}), "peft's naming"),
        (lambda t: t.update({"m.lora_down.weight": np.full((4, 7), np.nan)}), "NaN"),
    ],
)
def test_a_damaged_file_is_named_in_one_line(change, says, tmp_path):
    down, up = factors_of(np.random.default_rng(0), 9, 7, 4)
    tensors = {"m.lora_down.weight": down, "m.lora_up.weight": up}
    change(tensors)
    save_file({name: np.asarray(x) for name, x in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match=says):
        read_kohya(tmp_path / "x.safetensors")


@pytest.mark.parametrize("rslora", [False, True])
def test_experts_have_a_matrix_each_and_the_scale_of_their_own_rank(rslora, tmp_path):
    """Both layouts: stacked tensors, and those of PEFT's target_parameters (its einsum)."""
    rng = np.random.default_rng(2)
    num, r, into, out = 3, 4, 7, 9
    scale = 8 / (r**0.5 if rslora else r)
    a, b = rng.normal(size=(num * r, into)), rng.normal(size=(out, r * num))
    a, b = a.astype(np.float32), b.astype(np.float32)
    stacked = {"m.experts": (a.reshape(num, r, into), rng.normal(size=(num, out, r)))}
    config = {"use_rslora": rslora, "target_parameters": ["experts.w"], "target_modules": None}
    folder = write_peft(tmp_path / "parameters", {"m.experts": (a, b)}, **config)
    wanted = scale * np.einsum("ore,eri->eoi", b.reshape(out, r, num), a.reshape(num, r, into))
    found = read_factors(folder).factors
    assert list(found) == [f"m.experts[{n}]" for n in range(num)]
    for factors, delta in zip(found.values(), wanted, strict=True):
        assert factors.rank == r
        np.testing.assert_allclose(as_dense(factors), delta, rtol=1e-5, atol=1e-6)
    folder = write_peft(tmp_path / "stacked", stacked, use_rslora=rslora)
    wanted = scale * stacked["m.experts"][1] @ stacked["m.experts"][0]
    for factors, delta in zip(read_factors(folder).factors.values(), wanted, strict=True):
        np.testing.assert_allclose(as_dense(factors), delta, rtol=1e-5, atol=1e-6)


def test_doras_gain_is_in_the_change_where_the_base_is_known():
    rng = np.random.default_rng(3)
    (a, b), base = factors_of(rng, 9, 7, 2), rng.normal(size=(9, 7)).astype(np.float32)
    magnitude = rng.uniform(1, 3, size=9).astype(np.float32)
    one = AdapterFactors("x", {"w": Factors(a.T, b.T, 0.5, magnitude)}, is_dora=True)
    delta = dense(a, b, 0.5)
    gain = magnitude / np.linalg.norm(base + delta, axis=1)  # over inputs, as PEFT has it
    kernel = lambda adapter, module: base.T  # noqa: E731
    gained = with_gains(one, kernel)
    np.testing.assert_allclose(as_dense(gained.factors["w"]), gain[:, None] * delta, rtol=1e-5)
    for adapter in (one, gained):
        (found,) = analysis.profile_adapter(adapter, kernel)
        assert found.delta_norm == pytest.approx(np.linalg.norm(gain[:, None] * delta), 1e-5)
        assert found.dora_gain == pytest.approx((gain.min(), np.median(gain), gain.max()), 1e-5)
        tuned = (gain[:, None] * (base + delta)).astype(np.float32)
        wanted = analysis.intruder_dimensions(base.T, tuned.T)
        assert found.intruders == int(wanted.count)
    (plain,) = analysis.profile_adapter(one)
    assert plain.delta_norm == pytest.approx(np.linalg.norm(delta)) and plain.dora_gain is None


def numpy_phi(u1, u2):
    squares = np.cumsum(np.cumsum((u1.T @ u2) ** 2, axis=0), axis=1)
    i, j = np.indices(squares.shape) + 1
    return squares / np.minimum(i, j)


def test_all_pairs_are_each_pair_and_float64_numpys_whatever_their_ranks():
    """Ranks differ, one direction is zero, one matrix has another shape in one adapter."""
    rng = np.random.default_rng(4)
    ranks = (2, 5, 3, 5)
    some = []
    for n, r in enumerate(ranks):
        a, b = factors_of(rng, 20, 24, r)
        b[:, 0] *= n != 2
        factors = {"w": Factors(a.T, b.T, 1.0)}
        factors["v"] = Factors(*(x.T for x in factors_of(rng, 20, 24 + (n == 1), r)), 1.0)
        some.append(AdapterFactors(f"a{n}", factors))
    pairs = analysis.compare_all(some)
    assert [(p.first, p.second) for p in pairs] == [
        (f"a{i}", f"a{j}") for i, j in itertools.combinations(range(4), 2)
    ]
    assert [p.unlike for p in pairs] == [("v",), (), (), ("v",), ("v",), ()]
    for pair, (one, other) in zip(pairs, itertools.combinations(some, 2), strict=True):
        svds = [np.linalg.svd(as_dense(x.factors["w"]).T) for x in (one, other)]
        there = [x.factors["w"].rank - (x.name == "a2") for x in (one, other)]
        found = next(p for p in pair.profiles if p.module == "w")
        shared = slice(None, there[0]), slice(None, there[1])
        for grid, side in ((found.input, 0), (found.output, 2)):
            u1, u2 = (
                (svd[side] if side == 0 else svd[side].T)[:, :r]
                for svd, r in zip(svds, there, strict=True)
            )
            np.testing.assert_allclose(grid[shared], numpy_phi(u1, u2), atol=1e-6)
        alone = analysis.compare_adapters(one, other)
        for mine, own in zip(pair.profiles, alone.profiles, strict=True):
            np.testing.assert_allclose(mine.input, own.input, atol=1e-12)
            assert (mine.shared, mine.ranks) == (own.shared, own.ranks)


@pytest.mark.parametrize("size", [(3, 5, 40), (1, 1, 8), (4, 6, 8)])
def test_the_largest_of_random_pairs_is_as_large_as_those_of_gaussian_spaces(size):
    """300 times the largest φ of 32 pairs of QR-made spaces: ours lies among them."""
    r1, r2, d = size
    rng = np.random.default_rng(5)
    q1, q2 = (np.linalg.qr(rng.normal(size=(300 * 32, d, r)))[0] for r in (r1, r2))
    squares = np.swapaxes(q1, 1, 2) @ q2
    i, j = np.indices((r1, r2)) + 1
    phi = np.cumsum(np.cumsum(squares**2, axis=1), axis=2) / np.minimum(i, j)
    largest = phi.reshape(300, 32, r1, r2).max(axis=1)
    found = adapters._highest(r1, r2, d)
    assert np.all((largest.min(axis=0) <= found + 1e-9) & (found - 1e-9 <= largest.max(axis=0)))


def run_alone(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_neither_jax_nor_matplotlib_is_imported_for_files(tmp_path):
    rng = np.random.default_rng(6)
    folders = [
        write_peft(tmp_path / name, {"l.0.q": factors_of(rng, 20, 24, 4)}) for name in ("x", "y")
    ]
    args = ["analyze", *map(str, folders), f"--out={tmp_path}", "--json"]
    code = f"""
import sys
from lora_jax.cli.main import main
assert main({args}) == 0
late = {{"jax", "flax", "matplotlib", "pandas", "ml_collections"}} & sys.modules.keys()
assert not late, late
"""
    assert json.loads(run_alone(code))["pairs"]


def test_frames_hold_what_profiles_and_pairs_do(tmp_path):
    rng = np.random.default_rng(7)
    names = ("x", "y", "z")
    some = [
        AdapterFactors(
            name, {w: Factors(*(f.T for f in factors_of(rng, 20, 24, 3)), 1.0) for w in "ab"}
        )
        for name in names
    ]
    profiles = {one.name: analysis.profile_adapter(one) for one in some}
    frame = analysis.to_frame(profiles, seed=3)
    assert list(frame["adapter"]) == [n for n in names for _ in "ab"] and set(frame["seed"]) == {3}
    for row, one in zip(
        frame.itertuples(), [p for own in profiles.values() for p in own], strict=True
    ):
        assert (row.matrix, row.inputs, row.outputs) == (one.module, *one.shape)
        assert row.energy_rank_99 == one.energy_rank_99 and row.delta_norm == one.delta_norm
    pairs = analysis.compare_all(some)
    frame = analysis.to_frame(pairs)
    assert len(frame) == 6 and list(frame["second"])[::2] == ["y", "z", "z"]
    first = pairs[0].profiles[0]
    assert frame["input_first"][0] == first.input[0, 0]
    assert frame["output_all_expected"][0] == pytest.approx(3 / 20)
    grid = analysis.similarity_frame(first.input, dimension=24)
    assert grid["phi"].to_numpy().reshape(3, 3) == pytest.approx(first.input)
    stack = analysis.SharedDirections(np.array([1, 0]), np.ones((2, 3)), np.zeros((2, 3)))
    frame = analysis.to_frame(stack)
    assert list(frame["stack_0"]) == [0, 1] and frame["cosines"][1] == [1, 1, 1]
    dimension = analysis.intrinsic_dimension([1, 2], [[0.2], [0.9]], 1.0)
    assert analysis.to_frame(dimension)["dimension"].tolist() == [2]
    with pytest.raises(RequestError, match="got int"):
        analysis.to_frame(3)
    with pytest.raises(RequestError, match="one grid"):
        analysis.similarity_frame(np.ones(3))


def test_a_frame_without_pandas_names_the_extra():
    code = """
import sys
sys.modules["pandas"] = None
from lora_jax import analysis
try:
    analysis.to_frame([])
except ModuleNotFoundError as error:
    print(error)
"""
    assert "pip install 'lora_jax[data]'" in run_alone(code)
