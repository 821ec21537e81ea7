import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from lora_jax.train.compilation import CompiledByShape, enable_compilation_cache


@pytest.fixture
def no_cache():
    """JAX as it is without a cache, having compiled something already."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache.reset_cache()
    jax.jit(lambda x: x + 1)(1.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def test_programs_are_kept_in_the_user_s_cache(no_cache, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    enable_compilation_cache()
    jax.jit(lambda x: jnp.sin(x) * 17)(jnp.ones(3)).block_until_ready()
    assert any((tmp_path / "lora_jax" / "jax").iterdir())


def test_a_chosen_cache_is_left_alone(no_cache, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == str(tmp_path)


def test_each_batch_shape_compiles_once():
    traced = []

    def function(state, frozen, batch):
        traced.append(batch["input_ids"].shape)
        return state + frozen * batch["input_ids"].sum()

    compiled = CompiledByShape(jax.jit(function))
    assert compiled.seconds == 0.0
    for length in (4, 6, 4, 6, 4):
        result = compiled(jnp.ones(()), jnp.ones(()), {"input_ids": np.ones((2, length))})
        assert float(result) == 1 + 2 * length
    assert traced == [(2, 4), (2, 6)]
    assert compiled.use.batch_shapes == {(2, 4), (2, 6)}
    assert compiled.seconds > 0.0
