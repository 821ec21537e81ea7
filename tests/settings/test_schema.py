"""One place per fact: ranges, roles, help and hashes come from the schema."""

import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest

import lora_jax as lj
import lora_jax.settings
from lora_jax.core.errors import RequestError
from lora_jax.methods.registry import METHODS
from lora_jax.settings import SETTINGS, OptimizerSettings, Settings, check, schema
from lora_jax.settings.described import table

SMALL = {
    "model.name": "tiny-bert",
    "data.source": "reviews",
    "method.name": "lora",
    "optimizer.lr": 1e-3,
    "train.num_steps": 4,
}


def made(**changes):
    return Settings.from_flat({**SMALL, **changes})


def test_the_page_of_all_settings_is_the_schemas():
    page = Path(lora_jax.settings.__file__).parent / "README.md"
    assert table() in page.read_text(encoding="utf-8"), (
        "write it: python -m experiments.analysis index"
    )


@pytest.mark.parametrize("key", SETTINGS)
def test_every_setting_has_help_and_its_default_is_in_its_range(key):
    facts = SETTINGS[key]
    assert facts.help and "\n" not in facts.help
    if facts.default is not None:
        assert check(key, facts.default) == facts.default


@pytest.mark.parametrize("key", [key for key, facts in SETTINGS.items() if facts.range])
def test_a_value_out_of_range_is_named_with_the_range(key):
    facts = SETTINGS[key]
    for bound, step in (("low", -1), ("high", 1), ("above", 0), ("below", 0)):
        value = getattr(facts, bound)
        if value is not None:
            with pytest.raises(RequestError, match=f"{key}=.* must be a .*{value}"):
                check(key, value + step)
    if facts.choices:
        with pytest.raises(RequestError, match=f"{key}='nothing' is unknown; nearest: "):
            check(key, "nothing")
    elif facts.kind == "number":
        for value in (float("nan"), float("inf")):
            with pytest.raises(RequestError, match=f"{key}={value} must be"):
                check(key, value)


def test_a_range_is_checked_by_the_settings_as_a_whole():
    bad = made(**{"train.patience": -1})
    with pytest.raises(RequestError, match="train.patience=-1 must be a whole number, at least 0"):
        bad.check()
    with pytest.raises(RequestError, match="optimizer.lr=-1.0 must be"):
        OptimizerSettings(lr=-1.0).check()


def test_a_setting_that_is_not_recorded_changes_the_hash_only_where_it_differs_or_is_named():
    plain = made()
    assert "offload" not in plain.to_dict()["optimizer"] and plain.optimizer.offload is False
    assert made(**{"optimizer.offload": True}).hash != plain.hash
    # As configs have it that were written before: named, at its default.
    named = made(**{"optimizer.offload": False})
    assert named.to_dict()["optimizer"]["offload"] is False and named.hash != plain.hash
    changed = dataclasses.replace(plain.optimizer, offload=True)
    by_hand = dataclasses.replace(plain, optimizer=changed)
    assert by_hand.hash == made(**{"optimizer.offload": True}).hash


def test_bookkeeping_and_lanes_are_what_their_roles_say():
    plain = made()
    assert made(**{"train.log_every_steps": 3}).hash == plain.hash
    for key, value in {"method.rank": 4, "optimizer.lr": 1.0, "seed": 3}.items():
        lane = made(**{key: value})
        assert lane.hash != plain.hash and lane.program_key() == plain.program_key()
    assert made(seed=3).program_key(with_seed=True) != plain.program_key(with_seed=True)
    assert made(**{"train.patience": 3}).program_key() != plain.program_key()
    assert made(**{"data.limit": 3}).base_key != plain.base_key == made(seed=3).base_key


def test_an_integer_in_the_place_of_a_number_keeps_the_hash():
    config = made()
    assert (
        config.replace({"optimizer.clip_norm": 2}).hash == made(**{"optimizer.clip_norm": 2.0}).hash
    )


def test_settings_read_back_from_what_they_write():
    config = made(**{"notes.place.name": "here", "method.rows": {"embed": (0, 1)}})
    assert config.to_dict()["notes"] == {"place": {"name": "here"}}
    assert Settings.from_config(config.to_dict()) == config


def test_the_heads_of_the_schema_are_the_tasks():
    from lora_jax.train.task import TASKS

    assert set(SETTINGS["model.head"].choices) == set(TASKS)


@dataclasses.dataclass(frozen=True, init=False)
class Mine(lj.LoRA):
    """A variant outside the package."""

    strength: float = dataclasses.field(default=2.0, metadata={"help": "of it", "above": 0})
    FROZEN_PARTS: ClassVar = frozenset()


def test_a_variants_own_setting_joins_by_its_class(monkeypatch):
    monkeypatch.setattr(schema, "METHODS", dict(schema.METHODS))
    monkeypatch.setattr(schema, "SETTINGS", SETTINGS)
    schema.join_method("mine", dataclasses.fields(Mine)[-1:])
    try:
        config = made(**{"method.name": "mine", "method.strength": 3})
        assert config.method.strength == 3 and config.to_dict()["method"]["strength"] == 3
        with pytest.raises(RequestError, match="method.strength=0 must be a number, above 0"):
            check("method.strength", 0)
        with pytest.raises(RequestError, match="method 'lora' has no setting 'strength'"):
            made().replace({"method.strength": 3})
    finally:
        del SETTINGS["method.strength"]


def test_every_method_has_joined():
    assert schema.METHODS.keys() == METHODS.keys()
