"""PEFT adapters of a rank above the matrix's own: everything that ours do, they do."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lora_jax as lj
from lora_jax.peft.load import load_adapter, save_adapter

FOLDER = Path(__file__).resolve().parent.parent / "fixtures" / "peft"


@pytest.fixture
def wide(tmp_path):
    """An adapter of peft's with its factors padded by noise to rank 100, on matrices of 16."""
    folder = Path(shutil.copytree(FOLDER / "adapters" / "llama-list", tmp_path / "wide"))
    generator = np.random.default_rng(0)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, x in tensors.items():
        shape = (100, x.shape[1]) if ".lora_A." in name else (x.shape[0], 100)
        tensors[name] = generator.normal(scale=0.1, size=shape).astype(np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {"r": 100, "rank_pattern": {}, "alpha_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_rank_above_the_matrix_is_counted_bound_merged_and_saved(wide, tmp_path):
    model = lj.load_model(FOLDER / "bases" / "llama", tokenizer=False)
    method, trainable = load_adapter(wide, model)
    rows = [row for row in method.table(model.params) if row.rank]
    assert rows and all(row.rank == 100 > min(row.shape) for row in rows)
    held = sum(x.size for entry in trainable.values() for x in entry.values())
    assert sum(row.num_trainable for row in rows) == held
    ids = jnp.arange(12).reshape(2, 6)
    mask = jnp.ones_like(ids)
    apply = jax.jit(lj.lift(model.apply))
    bound = apply(method.bind(trainable, model.params), ids, mask)
    merged = apply(method.merge(trainable, model.params), ids, mask)
    plain = apply(model.params, ids, mask)
    np.testing.assert_allclose(bound, merged, atol=1e-4)
    assert float(jnp.max(jnp.abs(bound - plain))) > 0.1
    fresh, _ = method.init(jax.random.key(0), model.params)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, trainable)
    save_adapter(tmp_path / "again", method, trainable, model)
    first, again = (load_file(f / "adapter_model.safetensors") for f in (wide, tmp_path / "again"))
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_rank_above_the_matrix_of_ones_own_is_still_refused():
    model = lj.load_model(FOLDER / "bases" / "llama", tokenizer=False)
    method = lj.LoRA(targets="q", rank=100, aliases=model.aliases)
    with pytest.raises(lj.RequestError, match="rank 100 is above the full rank"):
        method.init(jax.random.key(0), model.params)
