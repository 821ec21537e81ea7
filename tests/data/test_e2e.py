"""The E2E folder: pairs in their order, references together, faults by file and line."""

import collections

import pytest
from ml_collections import ConfigDict

from lora_jax.core.errors import RequestError
from lora_jax.data import load_splits, references_of
from lora_jax.data.examples import completion_examples, limit_evaluation

LINES = {
    "train.txt": "name : A | area : x||A is in x . \nname : A | area : x||x has A .\n"
    "name : B||B .\n",
    "valid.txt": "name : C||C | D || E .\n",
    "test.txt": "name : B||There is B .\n\nname : D||D .\nname : B||B it is .\n",
}


@pytest.fixture
def folder(tmp_path):
    for name, text in LINES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def load(path):
    return load_splits(ConfigDict({"source": "e2e", "path": str(path), "limit": 0}), target="text")


def test_pairs_are_those_of_the_files(folder):
    splits = load(folder)
    assert splits.train.texts == ("name : A | area : x", "name : A | area : x", "name : B")
    assert splits.train.seconds == ("A is in x .", "x has A .", "B .")
    assert splits.validation.seconds == ("C | D || E .",)  # what follows the first bars
    assert splits.test.ids[1] == f"{folder / 'test.txt'}:3"
    assert splits.notes == ("1 of 2 test prompts are also in training",)


def test_references_are_grouped_by_their_prompt_wherever_they_stand(folder):
    test = load(folder).test
    assert references_of(test) == {"name : B": ("There is B .", "B it is ."), "name : D": ("D .",)}
    assert test.labels.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        (
            "train.txt",
            "name : A||A .\nname : A|A .\n",
            r"train.txt:2: no '\|\|' in 'name : A\|A .'",
        ),
        ("valid.txt", "name : A||  \n", r"valid.txt:1: no sentence next to"),
        ("test.txt", "||A .\n", r"test.txt:1: no properties next to"),
        ("test.txt", "\n", r"test.txt holds no examples"),
    ],
)
def test_fault_is_named_by_file_and_line(folder, file, text, words):
    (folder / file).write_text(text)
    with pytest.raises(RequestError, match=words):
        load(folder)


def test_missing_file_and_folder_say_what_belongs_there(folder):
    (folder / "valid.txt").rename(folder / "validation.txt")
    with pytest.raises(RequestError, match=r"valid.txt \(nearest: 'validation.txt'\)"):
        load(folder)
    with pytest.raises(RequestError, match=r"no such folder; it must hold train.txt"):
        load(folder / "nowhere")
    with pytest.raises(RequestError, match=r"needs data.path"):
        load("")


def test_an_evaluation_limit_keeps_the_references_of_a_prompt_together():
    prompts = [f"p{n // 3}" for n in range(30)]
    examples = completion_examples(
        prompts, [f"c{n}" for n in range(30)], [str(n) for n in range(30)]
    )
    for limit in (1, 3, 10, 29):
        kept = limit_evaluation(examples, limit, target="text")
        assert len(kept) == max(3, limit // 3 * 3)
        counts = collections.Counter(kept.texts)
        assert set(counts.values()) == {3}
    smaller, larger = (limit_evaluation(examples, n, target="text") for n in (6, 15))
    assert set(smaller.ids) < set(larger.ids)
    assert limit_evaluation(examples, 0, target="text") is examples
