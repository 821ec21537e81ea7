"""Each variant of LoRA through the trainer as it is: stopped, resumed, saved, loaded, merged."""

import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core import trees
from lora_jax.data import TrainIterator
from lora_jax.methods.registry import METHODS
from lora_jax.train import train
from lora_jax.train.adapted import load_run_adapter as load_adapter
from lora_jax.train.evaluate_run import evaluate_cell
from tests.train.results import results_of
from tests.train.test_resume import Crash, at_call, crash

VARIANTS = [name for name, kind in METHODS.items() if issubclass(kind, lj.LoRA) and name != "lora"]
# Plain LoRA is what `test_resume.py` and `test_train.py` train; of the others, the one whose bound
# value is its own and the one with most fixed parts run with the fast tests.
FAST = ("dora",)


@pytest.mark.parametrize(
    "name",
    [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS],
)
def test_a_variant_trains_resumes_saves_loads_and_merges(name, make_config, tmp_path):
    config = make_config({"method.name": name, "method.rank": 4, "train.num_steps": 8})
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(config, whole, progress=False)
    cell = whole / "cells" / "run"

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Crash):
        at_call(patch, TrainIterator, "__next__", 7, crash)  # behind the checkpoint at step 4
        train(config, stopped, progress=False)
    card = train(config, stopped, progress=False)
    assert results_of(stopped / "cells" / "run") == results_of(cell)

    adapted = load_adapter(cell / "adapter")
    assert type(adapted.method) is METHODS[name]
    lifted, merged = (evaluate_cell(cell, merged=merged)[0] for merged in (False, True))
    assert lifted.loss == card.metrics.test.loss
    np.testing.assert_allclose(merged.loss, lifted.loss, rtol=1e-5)
    before = dict(trees.flatten(adapted.frozen).items())
    after = dict(trees.flatten(adapted.method.merge(adapted.trainable, adapted.frozen)).items())
    moved = {path for path in after if not np.array_equal(before[path], after[path])}
    assert moved == set(adapted.trainable)
