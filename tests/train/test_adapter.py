import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.io.run_adapter import load_trainable, save_trainable
from lora_jax.serve.adapters import load_adapter


@pytest.fixture
def trainable():
    generator = np.random.default_rng(0)

    def normal(*shape):
        return generator.standard_normal(shape)

    return {
        "encoder/layers/0/query/kernel": {
            "a": jnp.asarray(normal(6, 2), jnp.float32),
            "b": jnp.asarray(normal(2, 5), jnp.bfloat16),
        },
        # A strided view: its bytes in memory are not in the order of its elements.
        "head/kernel": {"value": normal(3, 4).astype(np.float32).T},
        "scale:of": {"value": jnp.float32(2.0)},
    }


def test_saved_and_loaded_is_the_same_bit_for_bit(trainable, tmp_path):
    save_trainable(tmp_path / "adapter", trainable, {"method": {"rank": 2}})
    loaded, description = load_trainable(tmp_path / "adapter")
    assert description == {"method": {"rank": 2}}
    assert loaded.keys() == trainable.keys()
    for path, entry in trainable.items():
        assert loaded[path].keys() == entry.keys()
        for part, array in entry.items():
            assert loaded[path][part].dtype == array.dtype
            np.testing.assert_array_equal(
                np.asarray(loaded[path][part], np.float64), np.asarray(array, np.float64)
            )


def test_damaged_adapter_is_named(trainable, tmp_path):
    save_trainable(tmp_path / "adapter", trainable, {})
    tensors = tmp_path / "adapter" / "trainable.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-5])
    with pytest.raises(RequestError, match="trainable.safetensors.*truncated"):
        load_trainable(tmp_path / "adapter")
    (tmp_path / "adapter" / "method.json").write_text("{")
    with pytest.raises(RequestError, match="method.json"):
        load_trainable(tmp_path / "adapter")


DESCRIBED = {
    "model": {"name": "tiny-bert"},
    "method": {"name": "lora"},
    "seed": 0,
    "base_hash": "0" * 64,
}


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": value}, "seed") for value in (None, "0", 1.5, True, [], -1, 2**70)]
    + [({"base_hash": value}, "base_hash") for value in (None, 3, {})]
    + [({"model": value}, "model") for value in (None, "tiny-bert", [], {}, {"name": 3})]
    + [({"method": value}, "method") for value in (None, "lora", [], {}, {"name": ["lora"]})],
)
def test_description_of_wrong_types_is_named(trainable, tmp_path, change, named):
    save_trainable(tmp_path / "adapter", trainable, {**DESCRIBED, **change})
    with pytest.raises(RequestError, match=f"method.json: {named}"):
        load_adapter(tmp_path / "adapter")


def test_existing_folder_is_not_touched(trainable, tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine").write_text("keep")
    with pytest.raises(RequestError, match="exists already"):
        save_trainable(tmp_path / "adapter", trainable, {})
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["mine"]
