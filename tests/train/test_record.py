"""The record of a run as a type: what is written comes back; cards of any version are read."""

import dataclasses
import json
from pathlib import Path

import pytest

from lora_jax.core.errors import RequestError
from lora_jax.train.record import Card
from tests.cards import card_json

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
# Of cards as they were before packs, hashes of weights and the time were noted.
REQUIRED = [
    "config", "config_hash", "base_hash", "data_hash", "seeds", "device", "versions", "commit",
    "counts.adapter", "seconds.total", "program.K", "metrics.steps", "metrics.adapter_bytes",
    "metrics.train.loss", "metrics.validation.best_step", "metrics.test.n",
]  # fmt: skip


def test_every_committed_card_comes_back_byte_for_byte(tmp_path):
    paths = sorted(RESULTS.rglob("card.json"))
    assert len(paths) >= 130
    for path in paths:
        card = Card.read(path)
        card.write(tmp_path / "card.json")
        assert (tmp_path / "card.json").read_bytes() == path.read_bytes(), path
        assert not card.others and not card.metrics.others and not card.program.others


def test_keys_of_later_versions_come_back():
    later = {"metrics.test.f1": 0.25, "metrics.calibration": {"ece": 0.1}, "colour": ["red"]}
    values = card_json(later)
    card = Card.from_json(values)
    assert card.to_json() == values
    assert card.metrics.test.task_metrics == {"f1": 0.25}


@pytest.mark.parametrize("name", REQUIRED)
def test_a_field_that_every_card_has_is_asked_for_by_name(name):
    values = card_json()
    *holders, last = name.split(".")
    place = values
    for holder in holders:
        place = place[holder]
    del place[last]
    with pytest.raises(RequestError, match=f"^here/card.json: {name} is missing; restore it"):
        Card.from_json(values, "here/card.json")


def test_what_earlier_versions_did_not_note_is_none():
    card = Card.from_json(card_json())
    assert card.finished is card.metrics.weights_sha256 is card.program.numerics is None
    assert card.seconds.shared_by is card.program.mesh is card.config_name is None


@pytest.mark.parametrize("text, arg", [("my.py:lora", "lora"), ("my.py:", ""), ("my.py", None)])
def test_a_configs_file_and_argument_are_read_from_one_text_and_kept_apart(text, arg):
    card = Card.from_json(card_json(config_file=text))
    assert (card.config_file, card.config_arg, card.config_name) == ("my.py", arg, text)
    assert Card.from_json(card.to_json()) == card


def test_a_card_cannot_be_made_with_a_gap_or_changed():
    card = Card.from_json(card_json())
    fields = {field.name: getattr(card, field.name) for field in dataclasses.fields(card)}
    with pytest.raises(TypeError, match="base_hash"):
        Card(**{name: value for name, value in fields.items() if name != "base_hash"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.commit = "other"


def test_a_card_is_indexed_as_the_dict_it_was_with_a_warning_that_names_the_attribute():
    values = card_json({"metrics.test.matthews": 0.5})
    card = Card.from_json(values)
    with pytest.warns(DeprecationWarning, match="its attribute (metrics|test|loss)$"):
        assert card["metrics"]["test"]["loss"] == values["metrics"]["test"]["loss"]
    with pytest.warns(DeprecationWarning):
        assert card["metrics"]["test"]["matthews"] == 0.5
    for missing in ("finished", "no_such", "to_json"):
        with pytest.warns(DeprecationWarning), pytest.raises(KeyError, match=missing):
            card[missing]


def test_a_packed_run_says_with_which_cells():
    with pytest.raises(RequestError, match=r"card\.json: program\.cells is missing"):
        Card.from_json(card_json({"program.K": 2}), "card.json")


def test_what_is_no_card_is_one_line_with_its_place(tmp_path):
    for text in ("[]", "3", "{", "null"):
        (tmp_path / "card.json").write_text(text)
        with pytest.raises(RequestError, match=r"card\.json") as caught:
            Card.read(tmp_path / "card.json")
        assert "\n" not in str(caught.value)


def places_of(values, above=()):
    for key, value in values.items():
        yield (*above, key)
        yield from places_of(value, (*above, key)) if isinstance(value, dict) else ()


def test_another_value_in_any_place_comes_back_or_is_one_line():
    others = [None, True, -1, 2**63, 1.5, float("inf"), "x\ny", [], [[1]], {}, {"a\n": 1}]
    for place in places_of(card_json(config_file="my.py:lora", finished="2026")):
        for value in others:
            values = card_json({".".join(place): value})
            try:
                card = Card.from_json(values, "card.json")
            except RequestError as error:
                assert str(error).startswith("card.json") and "\n" not in str(error)
                continue
            assert json.dumps(card.to_json(), sort_keys=True) == json.dumps(values, sort_keys=True)
