"""People's own files: every format reads alike, splits are sound, mistakes are named."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from lora_jax.core.errors import RequestError
from lora_jax.data import load_splits
from lora_jax.data.examples import text_key
from lora_jax.data.files import sort_labels, split_of
from lora_jax.data.tables import read_rows


def load(source, path, **changes):
    base = {"source": source, "path": str(path), "text": "text", "label": "label", "limit": 0}
    return load_splits(ConfigDict(base | changes))


def pairs(count):
    return [(f"text number {i}", "good" if i % 3 else "bad") for i in range(count)]


def all_pairs(splits):
    return [
        (text, splits.label_names[label])
        for examples in (splits.train, splits.validation, splits.test)
        for text, label in zip(examples.texts, examples.labels, strict=True)
    ]


def write(path, kind, rows):
    """Writes rows with pandas, so that reading is checked against another writer."""
    table = pd.DataFrame(rows, columns=["text", "label"])
    if kind == "jsonl":
        table.to_json(path, orient="records", lines=True, force_ascii=False)
    elif kind == "csv":
        table.to_csv(path, index=False)
    elif kind == "tsv":
        table.to_csv(path, index=False, sep="\t", quoting=csv.QUOTE_NONE)
    else:
        table.to_parquet(path)


AWKWARD = ['comma, and "quotes"', "naïve 🎬\u2028film", "  blanks  ", "it's", "\ufeffmarked", "#1"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("labels", [("neg", "pos"), (0, 1), ("2", "10")])
def test_every_format_gives_the_same_rows(tmp_path, kind, labels):
    rows = [(text, labels[i % 2]) for i, text in enumerate(AWKWARD)]
    if kind != "tsv":  # A tab or a line end cannot be written there.
        rows.append(("two\nlines\tand a tab", labels[0]))
    path = tmp_path / "data.any"
    write(path, kind, rows)
    read = read_rows(path, kind, text_column="text", label_column="label")
    assert [(row.text, row.label) for row in read] == [(text, str(label)) for text, label in rows]


def test_places_are_the_lines_where_rows_begin(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('text,label\n"one\nand a half",x\n\ntwo,y\n')
    read = read_rows(path, "csv", text_column="text", label_column="label")
    assert [row.place for row in read] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ({"10", "9", "-1"}, ("-1", "9", "10")),
        ({"10", "9", "b"}, ("10", "9", "b")),
        ({"01", "1"}, ("01", "1")),
    ],
)
def test_labels_sort_as_numbers_where_all_are(labels, expected):
    assert sort_labels(labels) == expected


def test_whole_numbers_and_booleans_are_labels(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text":"a","label":1}\n{"text":"b","label":1.0}\n{"text":"c","label":true}\n')
    read = read_rows(path, "jsonl", text_column="text", label_column="label")
    assert [row.label for row in read] == ["1", "1", "true"]


def test_one_file_is_split_by_tenths_with_nothing_lost(write_jsonl):
    path = write_jsonl("all.jsonl", pairs(200))
    splits = load("jsonl", path)
    assert [len(x) for x in (splits.train, splits.validation, splits.test)] == [160, 20, 20]
    assert sorted(all_pairs(splits)) == sorted(pairs(200))
    assert splits.label_names == ("bad", "good")
    assert splits.train.labels.dtype == np.int32
    numbers = [int(text.split()[-1]) for text in splits.train.texts]
    assert numbers == sorted(numbers), "training keeps the file's order"
    assert splits.train.ids[0] == f"{path}:{numbers[0] + 1}"
    assert any("by hash" in note for note in splits.notes)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["A film.", "a film", "b", "C", "d!", "d"]), max_size=40))
def test_equal_texts_stay_together(write_jsonl, texts):
    rows = [(text, label) for text in [*texts, "x", "y", "z", "w"] for label in ("0", "1")]
    splits = load("jsonl", write_jsonl("all.jsonl", rows))
    keys = [
        {text_key(text) for text in examples.texts}
        for examples in (splits.train, splits.validation, splits.test)
    ]
    assert all(keys)
    assert sum(map(len, keys)) == len(set.union(*keys))
    assert sorted(all_pairs(splits)) == sorted(rows)


def test_the_automatic_split_does_not_depend_on_the_order_of_rows(write_jsonl):
    one = load("jsonl", write_jsonl("one.jsonl", pairs(60)))
    two = load("jsonl", write_jsonl("two.jsonl", pairs(60)[::-1]))
    assert set(one.test.texts) == set(two.test.texts)
    assert set(one.validation.texts) == set(two.validation.texts)


def test_the_hash_is_of_texts_labels_and_order_not_of_the_file(write_jsonl, tmp_path):
    rows = pairs(30)
    first = load("jsonl", write_jsonl("one.jsonl", rows)).data_hash
    write(tmp_path / "two.csv", "csv", rows)
    assert load("csv", tmp_path / "two.csv").data_hash == first
    relabelled = [*rows[:-1], (rows[-1][0], "bad" if rows[-1][1] == "good" else "good")]
    for other in (relabelled, rows[::-1], rows[:-1], [(f"{rows[0][0]}.", rows[0][1]), *rows[1:]]):
        assert load("jsonl", write_jsonl("other.jsonl", other)).data_hash != first


NAMES = {"train": "train.jsonl", "validation": "dev-00000-of-00001.jsonl", "test": "my_test.jsonl"}


@pytest.mark.parametrize("pattern", ["", "*.jsonl"])
def test_a_folder_or_pattern_gives_each_split_its_file(write_jsonl, tmp_path, pattern):
    rows = pairs(60)
    write_jsonl(NAMES["train"], rows[:30])
    write_jsonl(NAMES["validation"], rows[30:40])
    write_jsonl(NAMES["test"], rows[40:])
    (tmp_path / "notes.md").write_text("not data")
    splits = load("jsonl", tmp_path / pattern)
    assert splits.train.texts == tuple(text for text, _ in rows[:30])
    assert splits.validation.texts == tuple(text for text, _ in rows[30:40])
    assert splits.test.texts == tuple(text for text, _ in rows[40:])
    assert splits.notes == ()


def test_parts_of_a_split_join_and_a_missing_split_is_cut_from_training(write_jsonl, tmp_path):
    rows = pairs(60)
    write_jsonl("train-1.jsonl", rows[:20])
    write_jsonl("train-2.jsonl", rows[20:40])
    write_jsonl("test.jsonl", rows[40:])
    splits = load("jsonl", tmp_path)
    assert splits.test.texts == tuple(text for text, _ in rows[40:])
    assert len(splits.validation) == 4
    assert set(splits.train.texts) | set(splits.validation.texts) == {t for t, _ in rows[:40]}


def test_texts_shared_by_given_splits_are_noted(write_jsonl, tmp_path):
    rows = pairs(40)
    write_jsonl("train.jsonl", rows[:20])
    write_jsonl("valid.jsonl", rows[20:30])
    write_jsonl("test.jsonl", [*rows[30:], rows[0], (rows[1][0].upper(), rows[1][1])])
    assert load("jsonl", tmp_path).notes == ("2 of 12 test texts are also in training",)


@pytest.mark.parametrize(
    ("name", "split"),
    [("Train.csv", "train"), ("sst2.dev.tsv", "validation"), ("x_val_2.csv", "validation")],
)
def test_split_words_are_found_in_names(tmp_path, name, split):
    assert split_of(tmp_path / name) == split


@pytest.mark.parametrize("name", ["contest.csv", "train_test.csv", "constrained.csv"])
def test_a_name_with_no_or_two_splits_is_an_error(tmp_path, name):
    with pytest.raises(RequestError, match=f"{name} names "):
        split_of(tmp_path / name)


GOOD = [{"text": f"t{i}", "label": str(i % 2)} for i in range(20)]


def lines(*records):
    return "".join(f"{json.dumps(record)}\n" for record in records)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl holds no examples"),
        ("a.csv", "text,label\n", r"a\.csv holds no examples"),
        ("a.jsonl", lines(GOOD[0]) + '{"text": "b", "lab', r"a\.jsonl:2: not a JSON object"),
        ("a.jsonl", lines(GOOD[0], [1, 2]), r"a\.jsonl:2: a JSON list"),
        ("a.jsonl", lines(GOOD[0], {"text": " ", "label": 1}), r"a\.jsonl:2: .*'text' is empty"),
        ("a.jsonl", lines(GOOD[0], {"text": None, "label": 1}), r":2: .*'text' is empty"),
        ("a.jsonl", lines(GOOD[0], {"text": 7, "label": 1}), r":2: .*'text' holds 7, not a text"),
        ("a.jsonl", '{"text": "\\ud83d", "label": 1}', r":1: .*'text' holds half a character"),
        ("a.jsonl", lines({"txt": "b", "label": 1}), r":1: no column 'text' \(nearest: 'txt'\)"),
        (
            "a.jsonl",
            lines({"text": "b", "y": 1}),
            r"no column 'label'.*there: 'text', 'y'",
        ),
        ("a.jsonl", lines(GOOD[0], {"text": "b", "label": None}), r":2: .*'label' has no label"),
        ("a.jsonl", lines(GOOD[0], {"text": "b", "label": float("nan")}), r":2: .*has no label"),
        ("a.jsonl", lines(GOOD[0], {"text": "b", "label": 0.5}), r":2: .*'label' holds 0\.5"),
        ("a.jsonl", lines(*({"text": g["text"], "label": 1} for g in GOOD)), r"every.*label '1'"),
        ("a.jsonl", lines(*GOOD[:2]), r"2 distinct texts: too few"),
        ("a.csv", "text,label\na,1\nb,0,x\n", r"a\.csv:3: 3 fields where.*2 columns"),
        ("a.csv", "text,label\na,\n", r"a\.csv:2: .*has no label"),
        ("a.csv", 'text,label\na,1\n"b,0\nc,1\n', r"a\.csv:3: not a readable row.*quotes"),
        ("a.csv", "text,text\na,1\n", r"a\.csv:1: a column name stands twice"),
        ("a.csv", "body,label\na,1\n", r"no column 'text'.*there: 'body', 'label'"),
        ("a.tsv", "text\tlabel\na\n", r"a\.tsv:2: 1 fields"),
        ("a.csv", b"text,label\ncaf\xe9,1\n", r"a\.csv:2: not UTF-8"),
        ("a.parquet", b"PAR1 nothing PAR1", r"cannot read .*a\.parquet as parquet"),
    ],
)
def test_mistakes_in_a_file_are_named_with_their_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RequestError, match=message) as caught:
        load(path.suffix[1:], path)
    assert "\n" not in str(caught.value)


def test_a_missing_parquet_column_lists_those_there(tmp_path):
    pd.DataFrame({"sentence": ["a"], "label": [1], "x": [0.5]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(RequestError, match="there: 'sentence', 'label', 'x'"):
        load("parquet", tmp_path / "a.parquet")


def test_a_label_that_training_never_shows_is_named(write_jsonl, tmp_path):
    write_jsonl("train.jsonl", pairs(20))
    write_jsonl("val.jsonl", pairs(5))
    path = write_jsonl("test.jsonl", [("odd", "good"), ("new", "great")])
    with pytest.raises(RequestError, match=r"test\.jsonl:2: label 'great' of the test split") as e:
        load("jsonl", tmp_path)
    assert str(path) in str(e.value)
    assert "'bad', 'good'" in str(e.value)


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("jsonl", "", r"data\.source=jsonl needs data\.path"),
        ("jsonl", "revews.jsonl", r"no file found \(nearest: 'reviews\.jsonl'\)"),
        ("csv", ".", r"no \.csv file found"),
        ("jsonl", "nowhere/x.jsonl", "no file found"),
        ("json", "reviews.jsonl", r"data\.source='json' is unknown \(nearest: 'jsonl'\)"),
        ("reviews", "reviews.jsonl", r"data\.path=.*means nothing to data\.source=reviews"),
        ("jsonl", "other", "none of dev.jsonl, test.jsonl has 'train' in its name"),
    ],
)
def test_mistakes_in_source_and_path_are_named(write_jsonl, tmp_path, source, path, message):
    write_jsonl("reviews.jsonl", pairs(5))
    (tmp_path / "other").mkdir()
    write_jsonl("other/dev.jsonl", pairs(5))
    write_jsonl("other/test.jsonl", pairs(5))
    with pytest.raises(RequestError, match=message):
        load(source, tmp_path / path if path else "")


@pytest.mark.parametrize(
    ("limit", "message"),
    [(-1, r"data\.limit=-1 must be"), (1, r"data\.limit=1 leaves 1 of 2 labels")],
)
def test_a_limit_that_cannot_be_is_an_error(write_jsonl, limit, message):
    with pytest.raises(RequestError, match=message):
        load("jsonl", write_jsonl("all.jsonl", pairs(40)), limit=limit)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(4, 24), st.integers(1, 20))
def test_limits_nest_and_keep_proportions(write_jsonl, limit, more):
    path = write_jsonl("all.jsonl", pairs(60))
    small, large = (load("jsonl", path, limit=size).train for size in (limit, limit + more))
    assert len(small) == limit
    assert len(large) == limit + more
    assert set(small.ids) < set(large.ids)
    whole = load("jsonl", path).train
    assert abs(small.labels.mean() - whole.labels.mean()) <= 1 / limit
