"""Counts from shapes alone, against numbers of the papers and exact sums (shared/reference)."""

from __future__ import annotations

import math

import jax
import pytest

import lora_jax as lj
from lora_jax.core.errors import RequestError
from lora_jax.models.functional import flatten
from lora_jax.models.shapes import SHAPES, abstract_model


def size(model):
    return sum(math.prod(x.shape) for x in flatten(model.params).values())


def trained(model, rank, **settings):
    settings = {"targets": "q,v", "aliases": model.aliases, **settings}
    return lj.LoRA(rank=rank, **settings).table(model.params).num_trainable


@pytest.mark.parametrize(
    ("name", "params", "rank", "lora"),
    [
        ("gpt2", 124_439_808, 4, 147_456),
        ("gpt2-medium", 354_823_168, 4, 393_216),
        ("gpt2-large", 774_030_080, 4, 737_280),
        ("gpt3-175b", 174_604_259_328, 4, 18_874_368),  # Table 15: 18.8M
        ("gpt3-175b", 174_604_259_328, 64, 301_989_888),  # Table 15: 301.9M
        ("roberta-base", 124_055_040, 8, 294_912),
        ("roberta-large", 354_310_144, 8, 786_432),
    ],
)
def test_parameters_of_the_model_and_of_lora(name, params, rank, lora):
    model = abstract_model(name)
    assert size(model) == params
    assert trained(model, rank) == lora


@pytest.mark.parametrize(
    ("name", "total"), [("roberta-base", 887_811), ("roberta-large", 1_839_107)]
)
def test_the_papers_checkpoints_hold_lora_and_the_whole_head(name, total):
    assert trained(abstract_model(name, num_labels=3), 8, train="head/.*") == total


def test_gpt3_sizes_are_what_their_names_say():
    units = {"m": 1e6, "b": 1e9}
    for name in SHAPES:
        if name.startswith("gpt3-"):
            said = float(name[5:-1]) * units[name[-1]]
            assert size(abstract_model(name)) == pytest.approx(said, rel=0.03), name


def test_an_abstract_model_can_be_evaluated_in_shape():
    model = abstract_model("gpt2")
    ids = jax.ShapeDtypeStruct((2, 5), "int32")
    assert jax.eval_shape(model.apply, model.params, ids).shape == (2, 5, 50257)
    assert abstract_model("openai-community/gpt2").name == "gpt2"
    with pytest.raises(RequestError, match="gpt2-xl"):
        abstract_model("gpt2-xxl")
