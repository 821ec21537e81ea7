import errno
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.state import init_state


def make_groups(seed):
    """A train state of awkward values: bfloat16, NaN, -0.0, no axes, dots and slashes in paths."""
    generator = np.random.default_rng(seed)
    trainable = {
        "encoder/layers.0/kernel": {
            "a": jnp.asarray(generator.standard_normal((40, 8)), jnp.float32),
            "b": jnp.asarray(generator.standard_normal((8, 3)), jnp.bfloat16),
        },
        "head/bias": {"value": jnp.array([np.nan, -0.0, np.inf, 1e-42])},
        "scale": {"value": jnp.float32(seed)},
    }
    state = init_state(trainable, optax.adam(1e-3), jax.random.key(seed))
    return {"state": state, "best": jax.tree.map(lambda x: x + 1, trainable)}


def save_steps(folder, steps):
    with Checkpoints(folder) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_groups(step), {"loss": 0.1 * step, "data": {"next": step}})


def bits(tree):
    leaves = jax.tree.leaves(tree)
    plain = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in leaves
    ]
    return [(x.shape, str(x.dtype), np.asarray(x).tobytes()) for x in plain]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    save_steps(folder, [1, 2, 3])
    return folder


def test_restored_is_what_was_saved_bit_for_bit(saved):
    with Checkpoints(saved) as checkpoints:
        groups, facts = checkpoints.restore(make_groups(0))
    assert facts == {"loss": 0.1 * 3, "data": {"next": 3}}
    assert bits(groups) == bits(make_groups(3))
    assert jax.tree.structure(groups) == jax.tree.structure(make_groups(3))


def test_two_are_kept(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["2", "3"]


def test_nothing_saved_restores_nothing(tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        assert checkpoints.latest_step is None
        assert checkpoints.restore(make_groups(0)) is None


def test_a_group_may_be_left_out(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"state": make_groups(1)["state"]}, {})
        checkpoints.wait()
        groups, _ = checkpoints.restore(make_groups(0))
    assert groups.keys() == {"state"}


def test_buffers_may_be_donated_right_after_saving(tmp_path):
    groups = make_groups(1)
    wanted = bits(groups)
    overwrite = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, groups, {})
        overwrite({"best": groups["best"], "trainable": groups["state"].trainable})
        checkpoints.wait()
        restored, _ = checkpoints.restore(make_groups(0))
    assert bits(restored) == wanted


def test_restored_arrays_are_jax_s_own(saved):
    """A step donates them: a buffer still shared with NumPy would be written over."""
    with Checkpoints(saved) as checkpoints:
        groups, _ = checkpoints.restore(make_groups(0))
    bump = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    once = bits(bump(groups["state"].trainable))
    assert once == bits(jax.tree.map(lambda x: x + 1, make_groups(3)["state"].trainable))


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 0xFF
        path.write_bytes(content)
    elif how == "cut":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_damage_to_any_file_is_told_or_harmless(saved, tmp_path, how, capfd):
    """Either the very bits that were saved, or one line that names the step and the way out."""
    refused = 0
    for path in [path for path in (saved / "3").rglob("*") if path.is_file()]:
        if how == "flip" and not path.stat().st_size:
            continue
        copy = tmp_path / "copy"
        shutil.copytree(saved, copy)
        damage(copy / path.relative_to(saved), how)
        with Checkpoints(copy) as checkpoints:
            try:
                groups, _ = checkpoints.restore(make_groups(0))
            except RequestError as error:
                refused += 1
                assert f"checkpoint {copy / '3'} is damaged" in str(error)
                assert str(error).endswith("remove that folder to go on from step 2")
                assert "\n" not in str(error)
            else:
                assert bits(groups) == bits(make_groups(3)), path
        shutil.rmtree(copy)
    # The arrays' bytes, their index and the facts at least.
    assert refused >= 4
    assert capfd.readouterr().err == ""


def test_the_way_out_of_a_damaged_checkpoint_works(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    damage(copy / "3" / "facts" / "metadata", "flip")
    shutil.rmtree(copy / "3")
    with Checkpoints(copy) as checkpoints:
        groups, _ = checkpoints.restore(make_groups(0))
        assert bits(groups) == bits(make_groups(2))
        checkpoints.save(3, make_groups(3), {})
        checkpoints.wait()
        assert bits(checkpoints.restore(make_groups(0))[0]) == bits(make_groups(3))


def test_the_only_checkpoint_damaged_means_beginning_again(tmp_path):
    save_steps(tmp_path, [1])
    damage(tmp_path / "1" / "facts" / "metadata", "flip")
    with (
        Checkpoints(tmp_path) as checkpoints,
        pytest.raises(RequestError, match=f"remove {tmp_path} to begin again"),
    ):
        checkpoints.restore(make_groups(0))


def test_arrays_of_another_shape_are_refused(saved):
    other = make_groups(0)
    other["best"]["head/bias"]["value"] = jnp.zeros(5)
    with Checkpoints(saved) as checkpoints, pytest.raises(RequestError, match=r"\[4\].*\[5\]"):
        checkpoints.restore(other)


def test_what_a_killed_process_left_is_ignored_and_removed(saved, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    shutil.copytree(copy / "3" / "arrays", copy / "4.orbax-checkpoint-tmp" / "arrays")
    # Killed while an old step was deleted: a part of it is left.
    shutil.rmtree(copy / "2" / "arrays")
    with Checkpoints(copy) as checkpoints:
        groups, _ = checkpoints.restore(make_groups(0))
        assert bits(groups) == bits(make_groups(3))
        checkpoints.save(4, make_groups(4), {})
    assert sorted(path.name for path in copy.iterdir()) == ["3", "4"]


def test_no_space_for_the_arrays_keeps_the_last_good_checkpoint(tmp_path, capfd):
    """The write fails in the background, in the file itself (a limit on file sizes)."""
    save_steps(tmp_path, [1, 2])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"state": jax.random.normal(jax.random.key(0), (100_000,))}
    with pytest.raises(RequestError, match=r"cannot write .*free some space") as caught:  # noqa: SIM117
        with Checkpoints(tmp_path) as checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            try:
                checkpoints.save(3, big, {})
                checkpoints.wait()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
    with Checkpoints(tmp_path) as checkpoints:
        groups, _ = checkpoints.restore(make_groups(0))
        assert bits(groups) == bits(make_groups(2))
        checkpoints.save(3, make_groups(3), {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]


def test_no_space_at_once_is_a_request_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(ocp.CheckpointManager, "save", refuse)
        with pytest.raises(RequestError, match="step 7 .*No space left on device; free some"):
            checkpoints.save(7, make_groups(1), {})
