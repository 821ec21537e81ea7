"""GLUE's layouts, a few hand-made lines of each."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from lora_jax.core.errors import RequestError
from lora_jax.data import encode_examples, eval_batches, load_splits
from lora_jax.data.glue import GLUE_TASKS


def row(*fields):
    return "\t".join(fields) + "\n"


SINGLE = row("sentence", "label") + row('a "sharp film', "1") + row("dull", "0")
PAIR = row("index", "sentence1", "sentence2", "label")
PAIR += row("0", "a film", "not a film", "entailment") + row("1", "very", "dull", "not_entailment")
MNLI = row("index", "sentence1", "sentence2", "label1", "gold_label")
MNLI += row("0", "a film", "very dull", "neutral", "neutral")
MNLI += row("1", "a film", "dull", "neutral", "entailment")
MNLI += row("2", "a film", "funny", "neutral", "contradiction")
FILES = {
    "cola": (row("gj04", "1", "", "a film") + row("gj04", "0", "*", "film a"),) * 2,
    "sst2": (SINGLE,) * 2,
    "mrpc": (
        row("\ufeffQuality", "#1 ID", "#2 ID", "#1 String", "#2 String")
        + row("1", "7", "8", "a film", "a sharp film")
        + row("0", "7", "8", "dull", "funny"),
    )
    * 2,
    "stsb": (
        row("index", "genre", "sentence1", "sentence2", "score")
        + row("0", "g", "a film", "a film", "5.000")
        + row("1", "g", "dull", "funny", "0.750"),
    )
    * 2,
    "qqp": (
        row("id", "qid1", "qid2", "question1", "question2", "is_duplicate")
        + row("0", "1", "2", "a film", "film", "1")
        + row("a line", "broken")
        + row("1", "1", "2", "dull", "funny", "0"),
    )
    * 2,
    "qnli": (PAIR.replace("sentence1", "question").replace("sentence2", "sentence"),) * 2,
    "rte": (PAIR,) * 2,
}


def load(folder, task, target="class"):
    config = {"source": "glue", "path": str(folder), "task": task, "limit": 0}
    return load_splits(ConfigDict(config), target=target)


@pytest.mark.parametrize("task", FILES)
def test_texts_and_labels_are_those_of_the_columns(tmp_path, task):
    for name, text in zip(("train", "dev"), FILES[task], strict=True):
        (tmp_path / f"{name}.tsv").write_text(text, encoding="utf-8")
    splits = load(tmp_path, task, GLUE_TASKS[task].target)
    first = {
        "cola": ("a film", None, 1), "sst2": ('a "sharp film', None, 1),
        "mrpc": ("a film", "a sharp film", 1), "stsb": ("a film", "a film", 5.0),
        "qqp": ("a film", "film", 1), "qnli": ("a film", "not a film", 0),
        "rte": ("a film", "not a film", 0),
    }[task]  # fmt: skip
    for part in (splits.train, splits.validation, splits.test):
        second = None if part.seconds is None else part.seconds[0]
        assert (part.texts[0], second, part.labels[0]) == first
        assert len(part) == 2
    assert "dev.tsv" in splits.notes[0]
    assert splits.label_names == {
        "stsb": (), "qnli": ("entailment", "not_entailment"),
        "rte": ("entailment", "not_entailment"),
    }.get(task, ("0", "1"))  # fmt: skip
    assert splits.metrics == {"cola": ("matthews",), "stsb": ("pearson",)}.get(task, ())
    assert len(splits.notes) == (3 if task == "qqp" else 1)


def test_mnli_tests_on_the_dev_set_that_its_name_says(tmp_path):
    for name in ("train", "dev_matched"):
        (tmp_path / f"{name}.tsv").write_text(MNLI)
    (tmp_path / "dev_mismatched.tsv").write_text(MNLI.replace("a film", "a dull film"))
    assert load(tmp_path, "mnli").label_names == ("contradiction", "entailment", "neutral")
    assert load(tmp_path, "mnli").test.texts[0] == "a film"
    assert load(tmp_path, "mnli-mm").test.texts[0] == "a dull film"
    assert load(tmp_path, "mnli-mm").validation.texts[0] == "a film"


@pytest.mark.parametrize(
    ("task", "train", "words"),
    [
        ("sst3", SINGLE, r"'sst3' is no GLUE task \(nearest: 'sst2'\)"),
        ("rte", SINGLE, r"train.tsv:1: no column 'sentence1' \(nearest: 'sentence'\)"),
        ("sst2", row("sentence", "label"), "holds no examples"),
        ("sst2", row("sentence", "label") + row("a film", " "), r"train.tsv:2: an empty text"),
        ("sst2", row("sentence", "label") + row("a", "1") + row("b", "2"), r"dev.tsv:3: label '0'"),
        ("rte", None, r"no train.tsv \(it has dev.tsv\)"),
    ],
)
def test_fault_is_named(tmp_path, task, train, words):
    (tmp_path / "dev.tsv").write_text(SINGLE)
    if train is not None:
        (tmp_path / "train.tsv").write_text(train)
    with pytest.raises(RequestError, match=words):
        load(tmp_path, task)


def test_cola_is_not_read_from_another_tasks_folder(tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(FILES["stsb"][0])
    with pytest.raises(
        RequestError, match=r"train.tsv:1: label 'genre' is none of 0, 1; data.task"
    ):
        load(tmp_path, "cola")


def test_score_that_is_no_number_is_named(tmp_path):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(FILES["stsb"][0].replace("0.750", "low"))
    with pytest.raises(RequestError, match=r"train.tsv:3: the score is 'low'"):
        load(tmp_path, "stsb", "number")


def test_two_texts_are_encoded_as_the_tokenizers_pair(tmp_path, tokenizer):
    from tokenizers import processors

    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(PAIR)
    examples = load(tmp_path, "rte").train
    whole = encode_examples(tokenizer, examples, max_length=16)
    assert whole.tokens(0).tolist() == [1, 4, 7, 2, 10, 4, 7, 2]
    batch = eval_batches(whole, batch_size=2, buckets=(8,))[0]
    place = int(np.argmax(batch["index"] == 0))
    assert batch["token_type_ids"][place].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    # The longer text is cut first, so that something is left of both.
    cut = encode_examples(tokenizer, examples, max_length=7)
    assert cut.tokens(0).tolist() == [1, 4, 7, 2, 10, 4, 2]
    assert batch["labels"].dtype == np.int32


def test_numbers_reach_the_batch_as_numbers(tmp_path, tokenizer):
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text(FILES["stsb"][0])
    examples = load(tmp_path, "stsb", "number").train
    batch = eval_batches(
        encode_examples(tokenizer, examples, max_length=16), batch_size=3, buckets=(8, 16)
    )[0]
    assert batch["labels"].dtype == np.float32
    assert sorted(batch["labels"].tolist()) == [0.0, 0.75, 5.0]  # 0: the row that fills up
