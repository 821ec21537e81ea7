"""A draw of training examples per seed, alone and in a pack."""

import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.sweeps import run_sweep
from lora_jax.sweeps.record import read_packs
from lora_jax.train import train
from lora_jax.train.build import load_base
from tests.sweeps.stored_problem import sweep_of

DRAW = {"data.draw": 24, "data.buckets": (16,)}


def texts_of(base, config):
    """The tokens of each example of one epoch, padding cut."""
    batches = base.train_batches_of(config)
    rows = [next(batches) for _ in range(batches.steps_per_epoch)]
    return [
        tuple(ids[mask > 0])
        for batch in rows
        for ids, mask, weight in zip(
            batch["input_ids"], batch["attention_mask"], batch["weights"], strict=True
        )
        if weight
    ]


def test_each_seed_trains_on_its_own_draw_and_again_on_the_same(make_config):
    configs = [make_config({**DRAW, "seed": seed}) for seed in (0, 1, 0)]
    base = load_base(configs[0])
    first, other, again = (texts_of(base, config) for config in configs)
    whole = {tuple(base.encoded["train"].tokens(n)) for n in range(len(base.encoded["train"]))}
    assert first == again and len(first) == len(other) == 24
    assert set(first) != set(other) and set(first) | set(other) <= whole
    schedule = base.train_batches_of(configs[0])
    assert schedule.steps_per_epoch == 3
    fresh = base.train_batches_of(make_config({**DRAW, "data.draw": 25})).fingerprint
    assert len({schedule.fingerprint, fresh}) == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.draw": 10**6, "data.buckets": (16,)}, "draw=1000000, but there are .* draw fewer"),
        ({"data.draw": 8, "data.buckets": (8, 16)}, r"needs one padded length.*buckets=\(16,\)"),
        ({"data.draw": -1}, "data.draw=-1 must be a whole number, at least 0"),
    ],
)
def test_a_draw_that_cannot_be_is_refused(make_config, changes, words):
    config = make_config(changes)
    with pytest.raises(RequestError, match=words):
        load_base(config).train_batches_of(config)


def test_cells_of_other_draws_share_a_program_and_end_as_alone(make_config, tmp_path):
    cells = {f"s{seed}": {"seed": seed} for seed in (0, 1)}
    quick = {**DRAW, "train.num_steps": 6, "method.dropout": 0.0}
    packed = run_sweep(sweep_of(make_config, quick, cells), tmp_path / "w", progress=False)
    assert [len(record.cells) for record in read_packs(tmp_path / "w")] == [2]
    for name, own in cells.items():
        alone = train(make_config({**quick, **own}), tmp_path / "alone", name, progress=False)
        for split in ("validation", "test"):
            losses = [getattr(card.metrics, split).loss for card in (packed[name], alone)]
            np.testing.assert_allclose(*losses, rtol=1e-5)
    assert packed["s0"].metrics.test.loss != packed["s1"].metrics.test.loss
