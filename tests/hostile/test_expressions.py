"""Expressions of a stranger's adapter are matched within a time limit, as Python matches them."""

import re
import time

import pytest

from lora_jax.core.errors import RequestError
from lora_jax.core.rules import pattern_of
from lora_jax.io import matching
from lora_jax.peft.config import PeftConfig

MODULE = "base_model.model.model.layers.11.self_attn.q_proj.default_of_many"
HANGING = ["(.|[a-z._0-9])*X", ".*" * 30 + "X", "(.?){60}X", "((.{0,9}){0,9}){0,9}X", "(a|b|.)+Z"]


@pytest.fixture(autouse=True)
def short_limit(monkeypatch):
    monkeypatch.setattr(matching, "SECONDS", 0.2)
    matching.compile.cache_clear()
    yield
    matching.compile.cache_clear()


def config_with(field, text):
    plain = {"r": 2, "lora_alpha": 2.0, "target_modules": "all-linear"}
    lists = ("modules_to_save", "layers_pattern")
    value = (text,) if field in lists else text
    if field in ("rank_pattern", "alpha_pattern"):
        value = ((text, 3),)
    if field == "layers_pattern":
        plain |= {"target_modules": ("default_of_many",), "layers_to_transform": (1,)}
    return PeftConfig(**{**plain, field: value})


FIELDS = ["target_modules", "exclude_modules", "modules_to_save", "layers_pattern",
          "rank_pattern", "alpha_pattern"]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("text", HANGING[:2])
def test_each_field_of_a_config_is_matched_or_refused_within_the_limit(field, text):
    config = config_with(field, text)
    started = time.monotonic()
    try:
        config.targets(MODULE, is_linear=True, is_output=False)
        config.rank_of(MODULE)
        config.alpha_of(MODULE)
    except RequestError as error:
        assert "adapter_config.json" in str(error) and "\n" not in str(error)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("text", HANGING)
def test_a_configs_own_targets_are_matched_or_refused_within_the_limit(text):
    started = time.monotonic()
    try:
        assert not pattern_of(text).fullmatch(MODULE)
    except RequestError as error:
        assert "fewer repetitions" in str(error)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "text",
    [
        r"model(\.\w+)*\.(q_proj|v_proj)",
        r".*\.(q_proj|v_proj)",
        r"(?:model\.)?layers\.(?P<n>\d+)\..*?(?<!x)_proj",
        r"a{1,2}b{x}",
        r"[{]q\{e<=1}",
        r"qkv{e<=1}",
        "(?i:MODEL).*",
    ],
)
def test_ordinary_expressions_match_as_pythons_do(text):
    names = [
        "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "layers.3.a.b_proj",
        "aab{x}", "{q{e<=1}", "qkv", "qkx", "qkv{e<=1}", "model",
    ]  # fmt: skip
    for name in names:
        ours, theirs = matching.compile(text).fullmatch(name), re.fullmatch(text, name)
        assert (ours is None) == (theirs is None), name
        assert ours is None or ours.groups() == theirs.groups()
