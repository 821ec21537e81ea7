"""What the class of a method declares, and what that does for a variant in a file of its own."""

from __future__ import annotations

import dataclasses
import inspect
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lora_jax as lj
from lora_jax.methods.lora import LoRASettings
from lora_jax.methods.registry import METHODS
from tests.core.adapted import random_like

PARAMS = {"w": jax.random.normal(jax.random.key(0), (6, 4)), "head": jnp.ones((4, 2))}


def test_every_method_has_a_title_of_its_own():
    titles = {name: kind.TITLE for name, kind in METHODS.items()}
    assert titles["lora_fa"] == "LoRA-FA" and titles["full"] == "full fine-tuning"
    assert len(set(titles.values())) == len(METHODS)

    class Unnamed(lj.DoRA):
        pass

    assert Unnamed.TITLE == "Unnamed"


def with_field(**how):
    @dataclasses.dataclass(frozen=True, **how)
    class Variant(lj.LoRA):
        gain: float = 2.0
        train: str = "head"

        def __post_init__(self):
            if self.gain <= 0:
                raise lj.RequestError(f"gain is {self.gain}; it must be positive")

        def scale(self, rule):
            return self.gain

    return Variant


@pytest.mark.parametrize("how", [{}, {"init": False}], ids=["generated init", "init=False"])
def test_a_variant_with_a_field_of_its_own_is_a_plain_frozen_dataclass(how):
    kind = with_field(**how)
    default, own = kind(targets="w", rank=2), kind(targets="w", rank=2, gain=3.0, train="w.*x")
    assert (default.gain, default.train, default.rules[0].rank) == (2.0, "head", 2)
    assert (own.gain, own.train) == (3.0, "w.*x")
    assert own != default and own == kind(targets="w", rank=2, gain=3.0, train="w.*x")
    assert dataclasses.replace(own, rules=default.rules, train="head", gain=2.0) == default
    assert default.table(PARAMS).rows[-1].scale == 2.0
    with pytest.raises(lj.RequestError, match="gain is -1.0; it must be positive"):
        kind(targets="w", gain=-1.0)
    with pytest.raises(lj.RequestError, match="Variant has no setting 'gian'; nearest: 'gain'"):
        kind(targets="w", gian=3.0)
    with pytest.raises(lj.RequestError, match="nearest: 'rank'"):
        kind(targets="w", r=3)


def test_a_field_without_a_default_must_be_given():
    @dataclasses.dataclass(frozen=True)
    class Variant(lj.LoRA):
        gain: float

    assert Variant(targets="w", gain=2.0).gain == 2.0
    with pytest.raises(lj.RequestError, match="Variant needs gain=…, which has no default"):
        Variant(targets="w")


def test_a_variant_with_an_init_of_its_own_names_the_nearest_of_all_settings():
    @dataclasses.dataclass(frozen=True, init=False)
    class Variant(lj.LoRAPlus):
        gain: float = 1.0

        def __init__(self, *, gain=1.0, **settings):
            super().__init__(**settings)
            object.__setattr__(self, "gain", gain)

    made = Variant(targets="w", rank=2, ratio=4.0, gain=3.0)
    assert made.rate_multipliers == {"b": 4.0} and made.gain == 3.0
    for wrong, near in (("gian", "gain"), ("ration", "ratio"), ("lora_alpha", "alpha")):
        with pytest.raises(lj.RequestError, match=f"nearest: '{near}'"):
            Variant(targets="w", **{wrong: 1.0})


def test_the_typed_settings_are_the_arguments_of_lora():
    assert [*LoRASettings.__annotations__] == [*inspect.signature(lj.LoRA).parameters]


def test_old_names_work_and_say_the_new_ones():
    with pytest.warns(DeprecationWarning) as said:

        class Old(lj.LoRA):
            FIXED: ClassVar = frozenset({"a"})
            PADS: ClassVar = frozenset()
            WITHOUT: ClassVar = {"init": "its a is fixed"}
            ALONE: ClassVar = True

    assert [str(one.message) for one in said] == [
        f"Old defines {old}, which is now called {new}; rename it"
        for old, new in (
            ("FIXED", "FROZEN_PARTS"), ("ALONE", "EXCLUSIVE"), ("PADS", "ZERO_PADDABLE"),
            ("WITHOUT", "UNSUPPORTED_SETTINGS"),
        )
    ]  # fmt: skip
    assert {one.filename for one in said} == {__file__}
    assert {"a"} == Old.FROZEN_PARTS and frozenset() == Old.ZERO_PADDABLE and Old.EXCLUSIVE
    with pytest.raises(lj.RequestError, match="Old has no init: its a is fixed"):
        Old(targets="w", init="gaussian")
    with pytest.warns(DeprecationWarning, match="LoRAFA.FIXED is now called FROZEN_PARTS"):
        assert {"a"} == lj.LoRAFA(targets="w").FIXED


@pytest.mark.parametrize("table", ["FROZEN_PARTS", "RATE_MULTIPLIERS", "DECAY_MULTIPLIERS"])
def test_a_declaration_about_no_part_is_refused_where_the_class_is_defined(table):
    with pytest.raises(
        lj.RequestError, match=rf"V\.{table} names the part 'c', but PARTS has a, b"
    ):
        type("V", (lj.LoRA,), {table: {"c": 1.0}})
    with pytest.raises(lj.RequestError, match="V.PARTS has the roles 'six' for 'c'"):
        type("V", (lj.LoRA,), {"PARTS": {"a": "sir", "b": "sro", "c": "six"}})


class Declared(lj.LoRA):
    """Rates and decays of parts, declared on the class."""

    RATE_MULTIPLIERS: ClassVar = {"b": 4.0}
    DECAY_MULTIPLIERS: ClassVar = {"a": 0.0, "b": 0.5}


@pytest.mark.parametrize("combined", [False, True])
def test_a_step_has_the_rates_and_decays_of_its_parts(combined):
    """AdamW's first step by hand: -rate · (g / (|g| + eps) + decay · p)."""
    method = Declared(targets="w", rank=2, train="head")
    if combined:
        method = lj.Combined([Declared(targets="w", rank=2), lj.HeadOnly(train="head")])
    trainable = random_like(method.init(jax.random.key(0), PARAMS)[0], 1)
    grads = random_like(trainable, 2)
    tx = method.optimizer(optax.adamw(1e-2, eps=1e-8, weight_decay=0.1))
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    for name, part, rate, decay in (
        ("w", "a", 1e-2, 0.0), ("w", "b", 4e-2, 0.05), ("head", "value", 1e-2, 0.1)
    ):  # fmt: skip
        g, p = (np.asarray(tree[name][part], np.float64) for tree in (grads, trainable))
        expected = -rate * (g / (np.abs(g) + 1e-8) + decay * p)
        np.testing.assert_allclose(updates[name][part], expected, rtol=1e-4, atol=1e-7)
    with pytest.raises(lj.RequestError, match="which a mask cannot say"):
        method.mask(method.bind(trainable, PARAMS))
