"""Tensors written are the tensors read, whatever their dtype and layout."""

import errno
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.io.safetensors import read_metadata, read_tensors, write_tensors


def test_round_trip_of_dtypes_shapes_and_layouts(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {
        "float32": rng.normal(size=(3, 4)).astype(np.float32),
        "transposed": rng.normal(size=(3, 4)).astype(np.float32).T,
        "strided": rng.normal(size=(6, 4))[::2, ::-1],
        "scalar": np.float32(2.5),
        "empty": np.zeros((0, 3), np.float16),
        "bfloat16": rng.normal(size=(2, 3)).astype(ml_dtypes.bfloat16).T,
        "jax": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3),
        "int64": np.arange(3),
    }
    path = tmp_path / "sub" / "a.safetensors"
    write_tensors(path, tensors, metadata={"note": "kept"})
    again = read_tensors(path)
    assert again.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert again[name].dtype == tensor.dtype and again[name].shape == np.shape(tensor), name
        np.testing.assert_array_equal(again[name], np.asarray(tensor))
    assert read_metadata(path) == {"note": "kept"}
    write_tensors(path, {})
    assert read_tensors(path) == {} and read_metadata(path) == {"format": "pt"}


def test_the_same_tensors_give_the_same_bytes(tmp_path):
    tensors = {name: np.full((2, 2), i, np.float32) for i, name in enumerate("cab")}
    write_tensors(tmp_path / "one", tensors)
    write_tensors(tmp_path / "two", dict(sorted(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"a": np.ones(3)})

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RequestError, match="No space left"):
        write_tensors(path, {"a": np.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]
    np.testing.assert_array_equal(read_tensors(path)["a"], np.ones(3))


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(RequestError, match=r"nothing\.safetensors does not exist"):
        read_tensors(tmp_path / "nothing.safetensors")
    with pytest.raises(RequestError, match="is not a file"):
        read_tensors(tmp_path)
    (tmp_path / "text").write_text("not tensors at all")
    with pytest.raises(RequestError, match="not a safetensors file"):
        read_tensors(tmp_path / "text")
