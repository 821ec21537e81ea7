"""Methods that this package does not have: registered, named, packed, verified and reported."""

from __future__ import annotations

import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.analysis.adapters import factors_of
from lora_jax.methods.registry import METHODS, kind_of, method_of, title_of
from lora_jax.peft.save import save_adapter
from lora_jax.quant import merge_error
from lora_jax.report.groups import choose_rates, group_runs
from lora_jax.report.runs import read_runs
from lora_jax.sweeps import Cell, Sweep, run_sweep
from lora_jax.sweeps.verify import verify
from lora_jax.train import init_state, make_train_step
from tests.core.adapted import random_like
from tests.methods.miss import MiSS
from tests.methods.outside import Bottleneck, Gained
from tests.methods.variants import AXES, X, apply, matrices, params_of, trained
from tests.train.conftest import make_config, reviews_file

__all__ = ["make_config", "reviews_file"]

PRODUCTS = "plain|stacked|heads"


@pytest.mark.parametrize("rank", [2, 3, 5])
def test_miss_repeats_its_shard_along_the_inputs(rank):
    """Each row of ΔW by its definition, in float64 NumPy; 3 and 5 do not divide 6 and 8 inputs."""
    method = MiSS(targets="plain|stacked|heads|table", rank=rank, axes=AXES)
    params, trainable, frozen = trained(method)
    merged = method.merge(trainable, frozen)
    for name, entry in trainable.items():
        before, after = matrices(params[name], name), matrices(merged[name], name)
        shard = np.asarray(entry["shard"], np.float64).reshape(before.shape[0], rank, -1)
        expected = before.copy()
        for row in range(before.shape[1]):
            expected[:, row] += shard[:, row % rank]
        np.testing.assert_allclose(after, expected, atol=1e-6)


def test_a_registered_method_is_named_in_a_config_packed_verified_and_reported(
    register, make_config, tmp_path
):
    register("miss", MiSS)
    shared = {"method.name": "miss", "method.rank": 4, "train.num_steps": 2}
    cells = {
        "first": {"seed": 1},
        "second": {"optimizer.lr": 1e-2},
        "lora": {"method.name": "lora"},
    }
    sweep = Sweep(
        "outside", tuple(Cell(name, make_config({**shared, **own})) for name, own in cells.items())
    )
    results = run_sweep(sweep, tmp_path, progress=False)
    assert [results[name].program.K for name in cells] == [2, 2, 1]
    assert all(verdict.exact for verdict in verify(tmp_path / "cells/first", progress=False))
    chosen, _ = choose_rates(group_runs(read_runs(tmp_path))[0])
    assert {group.label.partition(" ")[0] for group in chosen} == {"MiSS", "LoRA"}


def test_a_registered_method_and_its_neighbours_share_a_sweep_in_memory(register):
    register("miss", MiSS)
    register("gained", Gained)
    cells = [
        {"method": "miss", "targets": PRODUCTS, "rank": 2, "lr": 1e-2},
        {"method": "gained", "targets": PRODUCTS, "rank": 2, "lr": 1e-2, "start": 2.0},
        {"method": "miss", "targets": PRODUCTS, "rank": 2, "lr": 3e-2, "train": "head"},
        {"method": "miss", "targets": PRODUCTS, "rank": 2, "lr": 3e-2},
        {"method": "lora", "targets": PRODUCTS, "rank": 2, "lr": 1e-2, "start": 2.0},
    ]
    loss = lambda params, batch: jnp.mean(apply(params, batch) ** 2)  # noqa: E731
    rows = lj.sweep(loss, params_of(), [X], cells, num_steps=4, axes=AXES, progress=False)
    packs = [row.pack for row in rows]
    assert packs[0] == packs[3] and len({packs[0], packs[1], packs[2]}) == 3
    assert all(row.losses[-1] < row.losses[0] for row in rows[:4])
    assert "'start' means nothing to method 'lora'" in rows[4].error


def test_a_name_is_an_identifier_of_no_other_and_its_class_a_method(register):
    for name, kind, said in (
        ("lora", MiSS, "method name 'lora' is LoRA's; choose another"),
        ("my lora", MiSS, "method name 'my lora': write letters, digits and _"),
        ("mine", MiSS(targets="w"), "it must be a class derived from lora_jax.LoRA"),
        ("mine", dict, "it must be a class derived from lora_jax.LoRA"),
    ):
        with pytest.raises(lj.RequestError, match=said):
            lj.register_method(name, kind)
    with pytest.raises(lj.RequestError, match="'miss' is unknown.*lora_jax.register_method"):
        kind_of("miss")
    assert title_of("miss") == "miss"
    register("miss", Gained)
    register("miss", MiSS)  # a notebook's cell that is run again
    assert kind_of("miss") is MiSS and title_of("miss") == "MiSS"


def test_installed_packages_name_their_methods_by_entry_points(register, monkeypatch):
    points = [
        importlib.metadata.EntryPoint(name, value, "lora_jax.methods")
        for name, value in (
            ("miss", "tests.methods.miss:MiSS"), ("broken", "tests.methods.miss:Lost"),
            ("lora", "tests.methods.miss:MiSS"),
        )
    ]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    monkeypatch.setattr(METHODS, "_kinds", dict(METHODS._kinds))
    monkeypatch.setattr(METHODS, "_is_complete", False)
    monkeypatch.setattr(METHODS, "broken", {})
    made = method_of("miss", {"targets": "w", "rank": 2, "alpha": 3.0}, axes=None, aliases=None)
    assert type(made) is MiSS and made.rules[0].rank == 2
    assert METHODS["lora"] is lj.LoRA and "broken" not in METHODS
    with pytest.raises(lj.RequestError, match="'broken': its entry point cannot be loaded .*Lost"):
        kind_of("broken")


def bottleneck():
    method = Bottleneck(targets=PRODUCTS, rank=3, alpha=6.0, axes=AXES, train="head")
    return method, *trained(method)


def by_hand(params, trainable, x):
    """The model of `variants` with its adapters written out."""

    def product(x, name, index=()):
        out = x @ params[name][index].reshape(x.shape[1], -1)
        a, b = (trainable[name][part][index] for part in "ab")
        return out + 2.0 * jax.nn.relu(x @ a) @ b.reshape(3, -1)

    h = x + params["table"][jnp.argmax(x, axis=1)]
    h = jnp.tanh(product(h, "plain"))
    for layer in range(2):
        h = h + jnp.tanh(product(h, "stacked", layer))
    h = product(h, "heads")
    return jnp.tanh(h) @ trainable["head"]["value"] + (h @ params["table"].T)[:, :3]


def test_a_part_of_the_computation_gives_what_it_gives_written_out(float64):
    method, params, trainable, frozen = bottleneck()
    cast = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float64), tree)  # noqa: E731
    params, trainable, frozen, x = cast(params), cast(trainable), cast(frozen), cast(X)

    def both(f):
        return jax.value_and_grad(lambda t: jnp.sum(jnp.sin(f(t))))(trainable)

    found = both(lambda t: lj.lift(apply)(method.bind(t, frozen), x))
    expected = both(lambda t: by_hand(params, t, x))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10)  # noqa: E731
    jax.tree.map(close, found, expected)


def test_a_part_of_the_computation_trains_through_the_train_step():
    method, _, trainable, frozen = bottleneck()

    def loss(trainable, frozen, batch, key):
        return jnp.mean(lj.lift(apply)(method.bind(trainable, frozen), batch) ** 2), {}

    tx = method.optimizer(optax.adam(1e-2))
    state = init_state(jax.tree.map(jnp.copy, trainable), tx, key=jax.random.key(0))
    step, losses = make_train_step(loss, tx), []
    for _ in range(5):
        state, metrics = step(state, frozen, X)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert all(np.any(state.trainable[n]["a"] != trainable[n]["a"]) for n in PRODUCTS.split("|"))


def test_what_has_no_merged_weights_says_so_in_one_way_everywhere():
    method, params, trainable, frozen = bottleneck()
    lora = lj.LoRA(targets="table", rank=1, axes=AXES)
    other = random_like(lora.init(jax.random.key(0), params)[0], 1)
    adapter = lj.arithmetic.Adapter(method, trainable, params)
    both = lj.Combined([method, lora])
    stored = lj.quantize(params, "plain")
    of_plain = {"plain": trainable["plain"]}
    wants_weights = {
        "merge": lambda: method.merge(trainable, frozen),
        "merge_all": lambda: lj.merge_all([(method, trainable), (lora, other)], params),
        "Combined": lambda: both.merge({**trainable, **other}, params),
        "an adapter's merge": adapter.merge,
        "to_lora": lambda: lj.arithmetic.to_lora(adapter),
        "negate": lambda: lj.arithmetic.negate(adapter),
        "compress": lambda: lj.arithmetic.compress(adapter, 1),
        "analysis": lambda: factors_of(method, trainable, params),
        "PEFT": lambda: _save_for_peft(method),
        "merge_and_requantize": lambda: lj.merge_and_requantize(method, of_plain, stored),
        "merge_error": lambda: merge_error(method, of_plain, stored, dtype=jnp.float32),
    }
    said = {}
    for place, ask in wants_weights.items():
        with pytest.raises(lj.RequestError) as caught:
            ask()
        said[place] = str(caught.value)
    assert len(set(said.values())) == 1, said
    assert said["merge"].startswith(
        "bottleneck adapter adds to the computation and not to a parameter, so no array holds"
    )
    with pytest.raises(lj.RequestError, match="the adapter of 'plain' adds to the computation"):
        jax.tree.leaves(method.bind(trainable, frozen)["plain"].materialise())


def _save_for_peft(method):
    model = lj.load_model("tiny-bert")
    own = Bottleneck(targets="q", rank=2, aliases=model.aliases)
    trainable, _ = own.init(jax.random.key(0), model.params)
    save_adapter("never written", own, trainable, model)


def test_a_part_of_the_computation_sits_on_another_adapter():
    method, params, trainable, frozen = bottleneck()
    lora = lj.LoRA(targets="plain", rank=1, axes=AXES)
    other = random_like(lora.init(jax.random.key(0), params)[0], 1)
    tree = lj.bind_all([(lora, other), (method, trainable)], params)
    found = lj.lift(apply)(tree, X)
    expected = by_hand(lora.merge(other, params), trainable, X)
    np.testing.assert_allclose(found, expected, atol=1e-5)
