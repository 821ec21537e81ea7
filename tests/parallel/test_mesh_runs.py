"""`train`, `sweep`, `evaluate`, `verify` on meshes: what comes out on one device, to rounding."""

from __future__ import annotations

import functools
import json
import re

import jax
import numpy as np
import pytest

from lora_jax.cli import evaluate as evaluate_command
from lora_jax.cli import sweep as sweep_command
from lora_jax.cli import train as train_command
from lora_jax.core.errors import RequestError
from lora_jax.models import load_model, save_model
from lora_jax.parallel import Placement, make_mesh, read_mesh
from lora_jax.parallel.offload import lacks_host_memory
from lora_jax.sweeps import run_sweep
from lora_jax.sweeps.groups import make_groups
from lora_jax.sweeps.prepared import make_ready
from lora_jax.sweeps.program import as_shapes
from lora_jax.sweeps.runner import fitting_width
from lora_jax.sweeps.verify import verify
from lora_jax.train import Interrupted, train
from lora_jax.train.build import load_base
from lora_jax.train.loop import Training
from tests.sweeps.stored_problem import CELLS, sweep_of
from tests.train.conftest import make_config, reviews_file
from tests.train.test_resume import at_call, interrupt

__all__ = ["make_config", "reviews_file"]
COLLECTIVES = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)"
    r"(-start)?\("
)
STEPS = {"train.num_steps": 20, "train.eval_every_steps": 10, "train.log_every_steps": 1}
RUN = {**STEPS, "optimizer.lr": 1e-3}
# Five make 8 places of cell=4.
FIVE = {**CELLS, "q-r2": {"method.targets": "q", "method.rank": 2, "seed": 3}}
# The same on fewer kernels and without masks, which are most of what there is to compile.
FIVE_DRY = {
    name: {**own, "method.dropout": 0.0}
    for name, own in {**FIVE, "all-r2": {**FIVE["all-r2"], "method.targets": "up"}}.items()
}


def mesh_of(text):
    return make_mesh(read_mesh(text))


def losses_of(workdir, name):
    """Every loss that the cell logged, and its last ones."""
    cell = workdir / "cells" / name
    rows = [json.loads(line) for line in (cell / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows]


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module")
def on_one_device(make_config, tmp_path_factory):
    """`on_one_device(method)`: the workdir of its run `RUN` there, trained once."""

    @functools.cache
    def workdir_of(method):
        workdir = tmp_path_factory.mktemp(method)
        train(make_config({**RUN, "method.name": method}), workdir, progress=False)
        return workdir

    return workdir_of


@pytest.mark.parametrize("text", ["data=2,fsdp=2,tensor=2", *slow("fsdp=8", "data=8", "tensor=8")])
@pytest.mark.parametrize("method", ["lora", *slow("full", "dora", "head")])
def test_a_run_on_a_mesh_has_the_losses_of_one_device(
    make_config, on_one_device, tmp_path, text, method
):
    config = make_config({**RUN, "method.name": method})
    card = train(config, tmp_path, progress=False, mesh=mesh_of(text))
    found, expected = (losses_of(where, "run") for where in (tmp_path, on_one_device(method)))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert card.program.mesh == text
    assert max(expected) - min(expected) > 1e-3


@pytest.mark.slow
def test_a_run_goes_on_on_its_mesh_bit_for_bit_and_elsewhere_to_rounding(
    make_config, tmp_path, monkeypatch
):
    text = "fsdp=4,tensor=2"
    config = make_config({"optimizer.lr": 1e-3, "train.checkpoint_every_steps": 2})
    whole = train(config, tmp_path / "whole", progress=False, mesh=mesh_of(text))
    for where in ("same", "one"):
        with monkeypatch.context() as patch:
            at_call(patch, Training, "_take_step", 7, interrupt)
            with pytest.raises(Interrupted):
                train(config, tmp_path / where, progress=False, mesh=mesh_of(text))
    again = train(config, tmp_path / "same", progress=False, mesh=mesh_of(text))
    other = train(config, tmp_path / "one", progress=False)
    assert again.metrics.weights_sha256 == whole.metrics.weights_sha256
    assert other.metrics.test.loss == pytest.approx(whole.metrics.test.loss, abs=2e-5)
    (verdict,) = verify(tmp_path / "whole" / "cells" / "run", progress=False)
    assert verdict.exact and verdict.same


def test_evaluating_on_a_mesh_is_evaluating(on_one_device, capsys):
    run, found = str(on_one_device("lora") / "cells" / "run"), []
    for more in ([], ["--mesh=fsdp=4,tensor=2"], ["--mesh=data=8", "--merged"]):
        assert evaluate_command.run([run, "--json", *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    for other in found[1:]:
        assert other["loss"] == pytest.approx(found[0]["loss"], abs=1e-5)
        assert other["n"] == found[0]["n"]


@pytest.mark.parametrize(
    "text, cells",
    [
        ("cell=4,fsdp=2", FIVE_DRY),
        *(
            pytest.param(text, FIVE, marks=pytest.mark.slow)
            for text in ("cell=4,fsdp=2", "cell=8", "cell=2,data=2,tensor=2")
        ),
    ],
)
def test_a_pack_on_a_mesh_has_the_losses_of_one_device(make_config, tmp_path, text, cells):
    sweep = sweep_of(make_config, RUN, cells)
    assert not _failed(run_sweep(sweep, tmp_path / "one", progress=False))
    cards = run_sweep(sweep, tmp_path / "mesh", progress=False, mesh=mesh_of(text))
    assert not _failed(cards)
    for name in cells:
        found, expected = (losses_of(tmp_path / where, name) for where in ("mesh", "one"))
        np.testing.assert_allclose(found, expected, atol=2e-5)
        assert cards[name].program.mesh == text and cards[name].program.K == 5


@pytest.mark.slow
@pytest.mark.parametrize("later", ["cell=4,fsdp=2", "cell=2,fsdp=4", ""])
def test_a_pack_is_narrowed_and_goes_on_on_a_mesh(make_config, tmp_path, later, monkeypatch):
    """Cells without hope end early; what is left moves together, there or on another mesh."""
    changes = {"optimizer.lr": 1e-3, "train.num_steps": 60, "train.patience": 1}
    cells = {name: dict(own) for name, own in FIVE.items()}
    for name in ("qv-r1", "qv-r4", "all-r2"):
        cells[name]["optimizer.lr"] = 0.0  # no look is better than the one before
    sweep, text = sweep_of(make_config, changes, cells), "cell=4,fsdp=2"
    assert not _failed(run_sweep(sweep, tmp_path / "one", progress=False))
    with monkeypatch.context() as patch:
        at_call(patch, Training, "_take_step", 11, interrupt)
        with pytest.raises(Interrupted):
            run_sweep(sweep, tmp_path / "mesh", progress=False, mesh=mesh_of(text))
    widths = set()
    real = Training._take_step

    def noted(self):
        widths.add(len(self.lanes))
        real(self)

    monkeypatch.setattr(Training, "_take_step", noted)
    cards = run_sweep(
        sweep, tmp_path / "mesh", progress=False, mesh=mesh_of(later) if later else None
    )
    assert not _failed(cards)
    assert min(widths) == (4 if later == text else 2)
    for name in cells:
        found, expected = (losses_of(tmp_path / where, name) for where in ("mesh", "one"))
        np.testing.assert_allclose(found, expected, atol=2e-5)
    if later == text:
        verdicts = verify(tmp_path / "mesh" / "cells" / "q-r2", progress=False)
        assert all(verdict.exact and verdict.same for verdict in verdicts) and len(verdicts) == 5


def _failed(results):
    return [result for result in results.values() if isinstance(result, RequestError)]


@pytest.mark.parametrize("at_once", [1, *slow(0, 2)])
def test_cells_over_cell_send_each_other_nothing(make_config, at_once):
    cells = {f"r{n}": {"method.rank": 1 + n % 4, "seed": n} for n in range(16)}
    counts = {}
    for text, targets, dropout in (("cell=8", "q,v", 0.2), ("cell=4,fsdp=2", "q", 0.0)):
        changes = {"method.targets": targets, "method.dropout": dropout}
        sweep = sweep_of(make_config, changes, cells)
        base = load_base(sweep.first[0].config, mesh_of(text))
        (pack,), _ = make_groups(sweep.first, base)
        ready = make_ready(pack, base, at_once=at_once)
        program = ready.program
        state = program.init(pack, [ready.params_of(cell) for cell in pack.cells])
        state, batch = as_shapes(state), as_shapes(ready.batches.at(0, pack.cells))
        state, frozen = program._placed(state, (pack.data(), ready.frozen))
        compiled = {"step": program._step.compiled(state, frozen, batch)}
        if text == "cell=8":
            widest = ready.batches.widest_evaluation()
            compiled["scores"] = program._scores.compiled(state.trainable, frozen, widest)
        for name, one in compiled.items():
            counts[text, name] = len(COLLECTIVES.findall(one.as_text()))
    assert counts["cell=8", "step"] == counts["cell=8", "scores"] == 0
    assert counts["cell=4,fsdp=2", "step"] > 0  # what is counted is there to be counted


@pytest.mark.parametrize("quantize", ["nf4", *slow(None)])
@pytest.mark.parametrize("scan_layers", [True, *slow(False)])
def test_a_model_is_loaded_where_it_lies(quantize, scan_layers, tmp_path):
    """From its tensors, and from a folder that has them in four bits already."""
    mesh = mesh_of("fsdp=4,tensor=2")
    one = load_model("tiny-llama", scan_layers=scan_layers, quantize=quantize)
    source, options = "tiny-llama", {"quantize": quantize}
    for _ in range(2):
        _check_where(one, mesh, source, {**options, "scan_layers": scan_layers})
        source, options = tmp_path / "folder", {}
        if not source.exists():
            save_model(source, one, one.params)


def _check_where(one, mesh, source, options):
    there = load_model(source, **options, sharding_of=Placement(mesh).leaf)
    assert there.base_hash == one.base_hash
    wanted = Placement(mesh, one).params(one.params)
    leaves = zip(jax.tree.leaves(there.params), jax.tree.leaves(wanted), strict=True)
    assert all(x.sharding.is_equivalent_to(where, x.ndim) for x, where in leaves)
    split = [x for x in jax.tree.leaves(there.params) if not x.sharding.is_fully_replicated]
    assert split


@pytest.mark.slow
def test_cells_alone_in_a_sweep_share_their_batch(make_config, tmp_path):
    """Full fine-tuning has no pack; where a batch does not divide, all devices do the same."""
    sweep = sweep_of(
        make_config,
        {"method.name": "full", "optimizer.lr": 1e-3},
        {"whole": {}, "parts": {"train.accumulate_steps": 2}},
    )
    base = load_base(sweep.first[0].config, mesh_of("cell=4,fsdp=2"))
    cards = run_sweep(sweep, tmp_path / "mesh", progress=False, mesh=mesh_of("cell=4,fsdp=2"))
    assert not _failed(cards)
    assert cards["whole"].program.mesh == "data=4,fsdp=2"
    assert cards["parts"].program.mesh == "cell=4,fsdp=2"
    one = train(sweep.first[0].config, tmp_path / "one", progress=False)
    assert cards["whole"].metrics.test.loss == pytest.approx(one.metrics.test.loss, abs=2e-5)
    assert base.placement.alone(8).mesh.shape["data"] == 4


@pytest.mark.slow
def test_a_pack_is_narrowed_in_whole_rows_of_the_mesh(make_config):
    """Ten cells on cell=4: 12 places, then 8, then 4; the best of all are counted as they lie."""
    cells = {f"r{n}": {"method.rank": 1 + n % 4, "seed": n} for n in range(10)}
    sweep = sweep_of(make_config, {}, cells)
    base = load_base(sweep.first[0].config, mesh_of("cell=4,fsdp=2"))
    (pack,), _ = make_groups(sweep.first, base)
    ready = make_ready(pack, base, at_once=1)
    whole, needed = fitting_width(ready, 2**40)
    assert whole == 10
    fewer, less = fitting_width(ready, needed - 1)
    assert fewer == 8 and less < needed
    fewest, least = fitting_width(ready, less - 1)
    assert fewest == 4 and least < less
    with pytest.raises(RequestError, match="one cell alone needs"):
        fitting_width(ready, least - 1)
    # On one device a cell more costs its state; here a row of four does.
    program = ready.program
    state = program.init(pack, [ready.params_of(cell) for cell in pack.cells])
    placed = program.take("state", state, [*range(10), 9, 9])
    kept = program.keep(None, placed.trainable, [*range(10), 12, 12], np.ones(12, bool), 12)
    for x in jax.tree.leaves((placed, kept)):
        assert x.sharding.shard_shape(x.shape)[0] == 3
    for one, first in zip(jax.tree.leaves(kept), jax.tree.leaves(state.trainable), strict=True):
        np.testing.assert_array_equal(one[:10], first)
        assert not np.any(one[10:])


@pytest.mark.slow
def test_going_on_on_another_mesh_is_on_the_card_and_no_false_alarm(
    make_config, tmp_path, monkeypatch
):
    config = make_config({"optimizer.lr": 1e-3, "train.num_steps": 6})
    with monkeypatch.context() as patch:
        at_call(patch, Training, "_take_step", 3, interrupt)
        with pytest.raises(Interrupted):
            train(config, tmp_path, progress=False, mesh=mesh_of("fsdp=4,tensor=2"))
    card = train(config, tmp_path, progress=False, mesh=mesh_of("data=8"))
    assert card.program.mesh == "fsdp=4,tensor=2, then data=8"
    (verdict,) = verify(tmp_path / "cells" / "run", progress=False)
    assert verdict.same and not verdict.exact
    assert verdict.conditions == ("mesh was fsdp=4,tensor=2, then data=8, is one device",)


def test_what_a_mesh_does_not_divide_is_named(make_config, tmp_path, monkeypatch):
    with pytest.raises(
        RequestError, match=r"batch_size=8 in 2 parts .* 8 places .* multiple of 16"
    ):
        config = make_config({"train.accumulate_steps": 2})
        train(config, tmp_path, progress=False, mesh=mesh_of("fsdp=8"))
    argv = ["--config=reviews_minilm:lora,smoke", f"--workdir={tmp_path}"]
    for text, says in (
        ("fsdp=3", "3 places, and there are 8 devices"),
        ("fsdb=8", "no axis 'fsdb'; nearest: 'fsdp'"),
        ("cell=8", "cell is for a sweep"),
    ):
        with pytest.raises(RequestError, match=says):
            train_command.run([*argv, f"--mesh={text}"])
    with pytest.raises(RequestError, match="no axis 'cells'; nearest: 'cell'"):
        sweep_command.run([*argv, "--sweep=demo", "--mesh=cells=8", "--plan"])
    cell = tmp_path / "cells" / "run"
    cell.mkdir(parents=True)
    (cell / "config.json").write_text("{}")
    with pytest.raises(RequestError, match="cell is for a sweep"):
        evaluate_command.run([str(cell), "--mesh=cell=8"])
    with pytest.raises(RequestError, match="texts are decoded on one device"):
        evaluate_command.run([str(cell), "--texts=3", "--mesh=data=8"])
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(RequestError, match="devices of one process, and there are 4"):
        train_command.run([*argv, "--mesh=data=8"])
    assert len(list(tmp_path.rglob("config.json"))) == 1


@pytest.mark.parametrize("text", ["", *slow("fsdp=8")])
def test_moments_in_the_hosts_memory_are_the_same_training(
    make_config, on_one_device, tmp_path, monkeypatch, text
):
    """On CPU both memories are one, but what moves between them is the same program."""
    if lacks_host_memory(jax.devices()[0]):
        pytest.skip("this JAX has no memory of the host's own on CPU")
    mesh = mesh_of(text) if text else None
    config = make_config({**RUN, "train.checkpoint_every_steps": 4, "optimizer.offload": True})
    whole = train(config, tmp_path / "whole", progress=False, mesh=mesh)
    with monkeypatch.context() as patch:
        at_call(patch, Training, "_take_step", 7, interrupt)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "again", progress=False, mesh=mesh)
    kinds = []
    real = Training.__init__

    def noted(self, cells, program, state, *rest):
        kinds.extend(x.sharding.memory_kind for x in jax.tree.leaves(state.opt_state) if x.ndim)
        kinds.extend(x.sharding.memory_kind for x in jax.tree.leaves(state.trainable))
        real(self, cells, program, state, *rest)

    monkeypatch.setattr(Training, "__init__", noted)
    again = train(config, tmp_path / "again", progress=False, mesh=mesh)
    assert kinds.count("pinned_host") == 2 * len(kinds) // 3  # two moments a parameter
    assert again.metrics.weights_sha256 == whole.metrics.weights_sha256
    plain = on_one_device("lora")
    found, expected = (losses_of(where, "run") for where in (tmp_path / "whole", plain))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert max(expected) - min(expected) > 1e-3


def test_a_backend_without_a_hosts_memory_says_so_and_goes_on(
    make_config, tmp_path, monkeypatch, capsys
):
    config = make_config({**RUN, "optimizer.offload": True})
    monkeypatch.setattr("lora_jax.parallel.offload.HOST", "no such kind")
    card = train(config, tmp_path, progress=False)
    assert "has no memory kind 'no such kind'" in capsys.readouterr().err
    assert card.metrics.stopped
