"""Sweeps in config files: what `add` takes, tuning, plans, status, and whose a workdir is."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.settings import Settings
from lora_jax.sweeps import Sweep, plan_sweep, read_sweep, run_sweep
from lora_jax.sweeps.cells import _check_name
from lora_jax.sweeps.record import PackRecord
from lora_jax.sweeps.run import note_sweep
from lora_jax.sweeps.status import seconds_left, sweep_status
from lora_jax.sweeps.view import SweepView
from lora_jax.train.workdir import lock_workdir
from tests.sweeps.stored_problem import CELLS, sweep_of

RATES = (1e-4, 3e-3, 1e-2)
# Where what is trained does not matter: no masks to compile, and one program for all of one width.
QUICK = {"train.num_steps": 6, "method.dropout": 0.0}


def sweep_in(tmp_path, config, body):
    path = tmp_path / "mine.py"
    path.write_text(f"def sweep_mine(add):\n    {body}\n", encoding="utf-8")
    return read_sweep(str(path), "mine", config)


def run(sweep, workdir, **options):
    return run_sweep(sweep, workdir, progress=False, **options)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("add('a'); add('a', seed=1)", "'a' twice"),
        ("add('a'); add('b')", "'a' and 'b' have the same settings"),
        ("add('a', **{'method.rnak': 2})", "no setting 'method.rnak'.*'method.rank'"),
        ("add('a', **{'method.rank': 'two'})", "method.rank='two' must be a whole number"),
        ("add('a/b')", "'a/b' cannot be a folder's"),
        ("pass", "adds no cell"),
        ("add('a', tune='optimizer.lr')", "tune is 'optimizer.lr'"),
        ("add('a', tune=('optimizer.lr', (1e-3,)))", "give 2 or more"),
        ("add('a', tune=('optimizer.lr', (1e-3, 1e-3)))", "all different"),
        ("add('a', tune=('optimizer.rl', (1e-3, 1e-2)))", "no setting 'optimizer.rl'"),
        ("add('a', tune=('optimizer.lr', (1e-3, 1e-2)), more_seeds=(0,))", "seeds .* repeat"),
        ("add('a', more_seeds=(1,))", "more_seeds needs tune"),
        ("add('a', tune_seeds=(1,))", "tune_seeds needs tune"),
        ("add('a', tune_with={'seed': 1})", "tune_with needs tune"),
        ("add('a', tune={})", "tune is empty"),
        ("add('a', tune=('seed', (1, 2)), tune_with=3)", "tune_with is 3; give settings"),
        (
            "add('a', tune=('optimizer.lr', (1e-3, 1e-2)), tune_with={'optimizer.lr': 1.0})",
            "tune_with sets 'optimizer.lr'",
        ),
        ("add('a', tune=('seed', (1, 2)), tune_with={'data.limt': 1})", "no setting 'data.limt'"),
        (
            "add('a', tune=('optimizer.lr', (1e-3, 1e-2)), tune_seeds=(1,), more_seeds=(1,))",
            "seeds .* repeat",
        ),
        ("add('a', tune=('optimizer.lr', (1e-3, 1e-2)), more_seeds=2)", "give whole numbers"),
        ("add('a', tune=('optimizer.lr', (1e-3, 1e-2)), more_seeds=('1',))", "whole numbers"),
        ("add('a', tune=('optimizer.lr', (1e-3, 1.0000001e-3)))", "first six digits"),
        ("add('a', tune=('method.rank', ([1], [2])))", "give numbers or texts"),
        ("add('a', tune=('method.targets', ('q', 'layer/.*')))", "cannot be a folder's"),
        ("add(3)", "cell name 3"),
        (
            "add('t-lr0.01-s0'); add('t', tune=('optimizer.lr', (1e-3, 1e-2)))",
            "named 't-lr0.01-s0'",
        ),
        (
            "add('t-lr0.01-s1', seed=9); "
            "add('t', tune=('optimizer.lr', (1e-3, 1e-2)), more_seeds=(1,))",
            "named 't-lr0.01-s1'",
        ),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(make_config, tmp_path, body, words):
    with pytest.raises(RequestError, match=words):
        sweep_in(tmp_path, make_config(), body)


def test_only_takes_a_tuned_contestant_whole_or_its_cells(make_config, tmp_path):
    body = f"add('x'); add('t', tune=('optimizer.lr', {RATES}), more_seeds=(1,), seed=4)"
    sweep = sweep_in(tmp_path, make_config(), body)
    names = ["x", "t-lr0.0001-s4", "t-lr0.003-s4", "t-lr0.01-s4"]
    assert [cell.name for cell in sweep.first] == names
    assert len(sweep.only("t-").tunings) == 1 and not sweep.only("t-").cells
    assert [c.name for c in sweep.only("0.01").first] == names[3:]
    assert not sweep.only("0.01").tunings
    with pytest.raises(RequestError, match="no cell's name contains 'zz'"):
        sweep.only("zz")


def test_tuning_chooses_on_validation_and_runs_more_seeds_with_it(make_config, tmp_path):
    body = f"add('t', tune=('optimizer.lr', {(*RATES, 1e30)}), more_seeds=(5, 6))"
    sweep = sweep_in(tmp_path, make_config(QUICK), body)
    results = run(sweep, tmp_path / "w")
    losses = [results[f"t-lr{rate:g}-s0"].metrics.validation.loss for rate in RATES]
    best = RATES[losses.index(min(losses))]
    tuned = json.loads((tmp_path / "w" / "tuned.json").read_text())["t"]
    assert tuned["chosen"] == best and tuned["validation_losses"][:3] == losses
    assert tuned["validation_losses"][3] == float("inf")
    assert tuned["at_edge"] == (best == RATES[0])
    assert {f"t-lr{best:g}-s{seed}" for seed in (0, 5, 6)} <= set(results)
    assert len(results) == 6
    # Again: the same choice, and nothing is run.
    assert run(sweep, tmp_path / "w").keys() == results.keys()


def test_several_seeds_choose_a_point_of_a_grid_and_are_not_reported(make_config, tmp_path):
    grid = {"optimizer.lr": (1e-3, 1e-2), "optimizer.weight_decay": (0.0, 0.5)}
    few = {"data.eval_limit": 8}
    body = f"add('t', tune={grid}, tune_seeds=(7, 8), tune_with={few}, more_seeds=(0,))"
    sweep = sweep_in(tmp_path, make_config(QUICK), body)
    chosen = run(sweep.choosing(), tmp_path / "w")
    assert len(chosen) == 8 and (tmp_path / "w" / "tuned.json").exists()
    assert len(sweep.first) == 8 and len(sweep.tunings[0].possible) == 12
    results = run(sweep, tmp_path / "w")
    names = [cell.name for cell in sweep.first]
    losses = np.reshape([results[name].metrics.validation.loss for name in names], (4, 2))
    points = [[lr, decay] for lr in (1e-3, 1e-2) for decay in (0.0, 0.5)]
    tuned = json.loads((tmp_path / "w" / "tuned.json").read_text())["t"]
    assert tuned["by_seed"] == losses.tolist() and tuned["values"] == points
    lr, decay = tuned["chosen"]
    assert [lr, decay] == points[losses.mean(axis=1).argmin()]
    reported = [results[name] for name in results if name not in names]
    assert [card.config["seed"] for card in reported] == [0]
    assert reported[0].config["optimizer"]["weight_decay"] == decay
    # What only the choosing cells have: fewer examples to evaluate.
    assert reported[0].config["data"].get("eval_limit") != 8
    assert all(results[name].config["data"]["eval_limit"] == 8 for name in names)


@pytest.mark.slow
def test_a_text_can_be_tuned_and_has_no_edge(make_config, tmp_path):
    body = "add('t', tune=('method.targets', ('q', 'v')), more_seeds=(3,))"
    results = run(sweep_in(tmp_path, make_config({"train.num_steps": 2}), body), tmp_path / "w")
    chosen = json.loads((tmp_path / "w" / "tuned.json").read_text())["t"]
    assert chosen["chosen"] in ("q", "v") and not chosen["at_edge"]
    assert f"t-targets{chosen['chosen']}-s3" in results


def test_the_plan_says_what_shares_a_program_and_who_is_refused(make_config, tmp_path):
    cells = {
        **CELLS,
        "r9": {"method.rank": 9},
        "r99": {"method.rank": 99},
        "full": {"method.name": "full"},
        "slow": {"method.rank": 2, "train.num_steps": 13},
        "frozen-head": {"method.rank": 2, "method.train": "pooler.*"},
    }
    lines = plan_sweep(sweep_of(make_config, {}, cells), tmp_path / "w")
    assert lines[0].startswith("4 in one program; padded to rank 2, 4, 8 on 12 parameters")
    assert [line for line in lines if line.startswith("alone")] == [
        "alone: r9", "alone: full", "alone: slow",
    ]  # fmt: skip
    refused = sorted(line for line in lines if line.startswith("refused"))
    assert "pooler" in refused[0] and "rank 99" in refused[1]
    assert not (tmp_path / "w").exists()


def test_a_first_cell_with_a_setting_out_of_range_does_not_take_the_others_with_it(
    make_config, tmp_path
):
    cells = {"bad": {"optimizer.lr": -1.0}, "worse": {"train.patience": -1}, "good": {"seed": 1}}
    lines = plan_sweep(sweep_of(make_config, QUICK, cells), tmp_path)
    assert sorted(lines) == [
        "alone: good",
        "refused: bad: optimizer.lr=-1.0 must be a number, at least 0",
        "refused: worse: train.patience=-1 must be a whole number, at least 0",
    ]


def test_cells_of_different_seeds_with_a_frozen_new_head_do_not_share(make_config, tmp_path):
    own = {"method.rank": 2, "method.train": ""}
    cells = {
        "a": {**own, "seed": 1},
        "b": {**own, "seed": 2},
        "c": {**own, "seed": 1, "method.alpha": 2.0},
    }
    lines = plan_sweep(sweep_of(make_config, {}, cells), tmp_path)
    assert sorted(lines)[-1] == "alone: b" and "2 in one program" in sorted(lines)[0]


@pytest.mark.slow
def test_a_memory_budget_narrows_packs_and_a_cell_too_large_is_told(make_config, tmp_path):
    cells = {f"s{seed}": {"seed": seed} for seed in range(3)}
    sweep = sweep_of(make_config, {"train.num_steps": 2}, cells)
    few = sweep_of(make_config, {"train.num_steps": 2}, {"a": {}, "b": {"seed": 1}})
    small = run(few, tmp_path / "none", memory_bytes=1000)
    assert all("one cell alone needs" in str(result) for result in small.values())
    wide = run(sweep, tmp_path / "wide")
    assert {result.program.K for result in wide.values()} == {3}
    budget = int(0.99 * wide["s0"].program.memory_bytes)
    narrow = run(sweep, tmp_path / "narrow", memory_bytes=budget)
    assert [result.program.K for result in narrow.values()] == [2, 2, 1]
    for name, result in narrow.items():
        same = result.metrics.test.loss
        assert same == pytest.approx(wide[name].metrics.test.loss, abs=1e-5)


def test_a_workdir_is_of_one_sweep_unless_told_otherwise(make_config, tmp_path):
    one = sweep_of(make_config, QUICK, {"a": {}})
    # A cell that cannot run: whose the workdir is is decided before.
    other = Sweep("other", sweep_of(make_config, QUICK, {"b": {"method.rank": 99}}).cells)
    run(one, tmp_path, source="x/mine.py")
    with pytest.raises(RequestError, match=r"of another sweep, 'test' of mine\.py.*--add"):
        run(other, tmp_path, source="x/mine.py")
    assert not (tmp_path / "cells" / "b").exists()
    assert run(other, tmp_path, source="x/mine.py", add=True).keys() == {"b"}
    changed = sweep_of(make_config, {**QUICK, "train.num_steps": 2}, {"a": {}})
    with pytest.raises(RequestError, match=r"train\.num_steps is 6 there, 2 here"):
        run(changed, tmp_path, source="x/mine.py")


def test_cells_that_a_sweep_no_longer_has_are_forgotten_unless_they_began(make_config, tmp_path):
    def note(name, *cells):
        sweep = sweep_of(make_config, {}, {cell: {} for cell in cells})
        note_sweep(Sweep(name, sweep.cells), tmp_path, "mine.py")
        return json.loads((tmp_path / "sweep.json").read_text())["cells"]

    assert note("one", "begun", "planned") == ["begun", "planned"]
    (tmp_path / "cells" / "begun").mkdir(parents=True)
    assert note("one", "new") == ["begun", "new"]
    # Beside another sweep nobody knows whose a cell is.
    assert note("other", "b") == note("one", "begun") == ["begun", "new", "b"]


def test_status_is_read_from_files(make_config, tmp_path):
    with pytest.raises(RequestError, match="holds no sweep"):
        sweep_status(tmp_path)
    cells = {"a": {}, "bad": {"method.rank": 99}, "nan": {"optimizer.lr": 1e30, "seed": 1}}
    sweep = sweep_of(make_config, QUICK, cells)
    run(sweep, tmp_path)
    states = {cell.name: cell for cell in sweep_status(tmp_path)}
    assert {n: c.state for n, c in states.items()} == {
        "a": "done",
        "bad": "failed",
        "nan": "failed",
    }
    assert "rank 99" in states["bad"].note and "loss is nan" in states["nan"].note
    assert states["a"].step == states["a"].num_steps == 6
    (tmp_path / "cells" / "a" / "card.json").unlink()
    (unfinished, *_) = sweep_status(tmp_path)
    assert unfinished.state == "stopped" and unfinished.seconds > 0
    with lock_workdir(tmp_path):
        (unfinished, *_) = sweep_status(tmp_path)
        assert unfinished.state == "running" and seconds_left([unfinished]) == 0.0


def test_the_view_counts_cells_and_says_what_is_left():
    now, stream = [0.0], io.StringIO()
    with SweepView(stream=stream, clock=lambda: now[0]) as view:
        view.expect(4)
        view.expect(0, 4 * 10)
        view.ended(failed=True)
        with view.running(2, 10), view.show_with("pack-1", 10) as show:
            now[0] = 5.0
            show(2, None, None)  # not yet: a line each 10 s
            now[0] = 20.0
            show(5, 0.5, None)
            now[0] = 21.0
            show(10, 0.25, None)
    # 10 of 40 cell-steps took 20 s: 60 s for the other 30.
    assert stream.getvalue() == (
        "0 done, 2 running, 1 failed, 1 waiting; 1:00 left  pack-1 step 5/10  loss 0.5000\n"
        "0 done, 2 running, 1 failed, 1 waiting; 0:21 left  pack-1 step 10/10, evaluating"
        "  loss 0.2500\n"
    )


def test_a_packs_name_is_of_its_cells_in_their_slots(make_config):
    def name_of(cells):
        return PackRecord(cells, 0).name

    cells = sweep_of(make_config, {}).cells
    name = name_of(cells)
    assert re.fullmatch(r"pack-[0-9a-f]{10}", name)
    assert name_of(sweep_of(make_config, {}).cells) == name
    assert name_of(sweep_of(make_config, {"train.log_every_steps": 9}).cells) == name
    assert name_of(cells[::-1]) != name
    assert name_of(sweep_of(make_config, {"train.num_steps": 9}).cells) != name


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_system_holds_is_refused(name):
    with pytest.raises(RequestError, match="cannot be a folder's"):
        _check_name(name)


def test_numpy_scalars_and_a_methods_own_settings_are_taken_as_plain_ones():
    config = Settings.from_config({"seed": 0, "method": {"name": "lora_plus", "rank": 8}})
    made = config.replace({"method.rank": np.int64(4), "method.ratio": np.float64(8)})
    assert (made.method.rank, made.method.ratio) == (4, 8.0)
    assert type(made.method.rank) is int and type(made.method.ratio) is float
