"""Settings by the names of other libraries, targets by their habits, variants written wrongly."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import pytest

import lora_jax as lj
from lora_jax.core.patterns import FAMILY_ALIASES
from lora_jax.models.tiny import TINY_MODELS

PARAMS = {
    "layers": [{"query": {"kernel": jnp.ones((6, 4))}}, {"query": {"kernel": jnp.ones((6, 4))}}],
    "head": {"kernel": jnp.ones((4, 3))},
}


def refusal(make) -> str:
    with pytest.raises(lj.RequestError) as caught:
        make()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "settings, here",
    [
        ({"lora_alpha": 16}, "alpha"),
        ({"r": 8}, "rank"),
        ({"target_modules": "q"}, "targets"),
        ({"modules_to_save": "head"}, "train"),
        ({"rank_pattern": {}}, "rules"),
        ({"lora_dropout": 0.1}, "dropout"),
    ],
)
@pytest.mark.parametrize("kind", [lj.LoRA, lj.DoRA, lj.LoRAPlus])
def test_a_setting_of_peft_is_answered_with_its_name_here(kind, settings, here):
    assert f"nearest: {here!r}" in refusal(lambda: kind(**settings))


def test_every_method_and_rule_names_the_nearest_setting():
    assert "nearest: 'rank'" in refusal(lambda: lj.UniLoRA(r=4))
    assert "nearest: 'rank'" in refusal(lambda: lj.Rule("q", r=4))
    assert "nearest: 'train'" in refusal(lambda: lj.HeadOnly(modules_to_save="head"))
    assert "nearest: 'rank'" in refusal(lambda: lj.VeRA(targets="q", r=4))


@pytest.mark.parametrize(
    "targets, write",
    [
        ("kernel", ".*/kernel"),
        ("query", ".*/query/.*"),
        ("query/kernel", ".*/query/kernel"),
        ("query|head", ".*/(?:query|head)/.*"),
        ("query.kernel", ".*/query/kernel"),
        ("head", "head/.*"),
    ],
)
def test_an_end_or_middle_of_a_path_is_answered_with_the_whole(targets, write):
    said = refusal(lambda: lj.LoRA(targets=targets, rank=1).init(jax.random.key(0), PARAMS))
    assert f"an expression must match the whole path: write {write!r}" in said
    lj.LoRA(targets=write, rank=1).init(jax.random.key(0), PARAMS)  # and it does
    whole = refusal(
        lambda: lj.LoRA(targets="head/kernel", rank=1, train=targets).init(
            jax.random.key(0), PARAMS
        )
    )
    assert f"write {write!r}" in whole


def test_aliases_on_a_model_of_ones_own_are_said_to_belong_to_families():
    said = refusal(lambda: lj.LoRA(targets="q,v", rank=1).init(jax.random.key(0), PARAMS))
    assert "aliases belong to models of lora_jax.load_model; write the paths" in said


def test_numbers_in_paths_are_explained():
    params = [jnp.ones((4, 4)), {"w": jnp.ones((4, 4))}]
    said = refusal(lambda: lj.LoRA(targets="first", rank=1).init(jax.random.key(0), params))
    assert "'0', '1/w'" in said and "a place in a list or tuple" in said


@dataclasses.dataclass(frozen=True, init=False)
class Wrong(lj.LoRA):
    AS: ClassVar = {
        "transposed": lambda a, b: (b, a),
        "flat": lambda a, b: (a[0], b),
        "ranks": lambda a, b: (a[..., :1], b),
        "scalar": lambda a, b: (1.0, b),
    }
    how: str = "transposed"

    def __init__(self, *, how, **settings):
        super().__init__(**settings)
        object.__setattr__(self, "how", how)

    def factors(self, parts, site):
        return self.AS[self.how](parts["a"], parts["b"])


@pytest.mark.parametrize(
    "how, shapes",
    [
        ("transposed", "a (2, 3) and b (4, 2)"),
        ("flat", "a (2,) and b (2, 3)"),
        ("ranks", "a (4, 1) and b (2, 3)"),
        ("scalar", "a () and b (2, 3)"),
    ],
)
def test_factors_of_wrong_shapes_are_refused_with_both_shapes(how, shapes):
    method = Wrong(targets="head/kernel", rank=2, how=how)
    trainable, frozen = method.init(jax.random.key(0), PARAMS)
    said = refusal(lambda: method.merge(trainable, frozen))
    assert said == (
        f"Wrong.factors of 'head/kernel' (4, 3) gives {shapes}; it must give a (4, k) and "
        "b (k, 3), with any k"
    )


@pytest.mark.parametrize("targets", [5, None, [1], b"w", [None, "w"], 1.5])
def test_targets_that_are_no_texts_are_refused(targets):
    said = refusal(lambda: lj.Rule(targets, rank=1))
    assert said == f"targets is {targets!r}; it must be a text or a sequence of texts"
    if targets is not None:
        whole = lambda: lj.LoRA(targets="head/kernel", rank=1, train=targets)  # noqa: E731
        assert "must be a text" in refusal(lambda: whole().init(jax.random.key(0), PARAMS))


def test_the_aliases_that_core_knows_are_those_of_the_families():
    assert {
        alias for name in TINY_MODELS for alias in lj.load_model(name).aliases
    } == FAMILY_ALIASES
