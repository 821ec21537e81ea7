"""BLEU, ROUGE-L and the tasks' metrics, on cases counted by hand."""

import math
import random

import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.train.task_metrics import matthews, pearson
from lora_jax.train.text_metrics import score_texts

TEXT, OTHER = "a b c d e f g h", "x y z w"


def test_bleu_and_rouge_are_those_counted_by_hand():
    # 7 words of 8; matched n-grams 6 of 7, 4 of 6, 2 of 5, 1 of 4; 6 in order, of 7 and 8.
    found = score_texts(["a b c d e x g"], [[TEXT]])
    precision = math.exp(sum(map(math.log, (6 / 7, 4 / 6, 3 / 5, 2 / 4))) / 4)
    assert found["bleu"] == pytest.approx(100 * math.exp(1 - 8 / 7) * precision)
    assert found["rouge_l"] == pytest.approx(100 * 2 * 6 / (7 + 8))
    assert found["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp")


def test_text_that_is_a_reference_scores_100_whatever_the_others():
    found = score_texts([TEXT, OTHER], [[OTHER, TEXT], [OTHER]])
    assert (found["bleu"], found["rouge_l"], found["n"]) == (pytest.approx(100), 100, 2)


def test_references_differ_in_number():
    """A reference more, for one text only, counts for that text alone: by hand, of unigrams."""
    texts = ["a b c d", "e f g h"]
    few = score_texts(texts, [["a b c x"], ["e f y z"]])
    more = score_texts(texts, [["a b c x"], ["e f y z", "e f g h"]])
    assert few["rouge_l"] == pytest.approx(100 * (3 / 4 + 2 / 4) / 2)
    assert more["rouge_l"] == pytest.approx(100 * (3 / 4 + 1) / 2)
    precision = math.exp(sum(map(math.log, (7 / 8, 5 / 6, 3 / 4, 1 / 2))) / 4)
    assert more["bleu"] == pytest.approx(100 * precision)


def test_order_does_not_matter():
    generator = random.Random(0)
    words = ["the", "pub", "by", "river", "is", "cheap", "."]
    say = lambda: " ".join(generator.choices(words, k=generator.randint(4, 9)))  # noqa: E731
    pairs = [(say(), [say() for _ in range(generator.randint(1, 4))]) for _ in range(9)]
    first = score_texts(*zip(*pairs, strict=True))
    generator.shuffle(pairs)
    for _, references in pairs:
        generator.shuffle(references)
    second = score_texts(*zip(*pairs, strict=True))
    assert first == {k: pytest.approx(v) if isinstance(v, float) else v for k, v in second.items()}


def test_case_counts_where_the_name_says_so():
    found = score_texts(["The pub is by the river ."], [["the Pub is by the river ."]])
    assert found["bleu"] < 100 and found["bleu_any_case"] == pytest.approx(100)
    assert "case:lc" in found["bleu_any_case_signature"]


@pytest.mark.parametrize(
    ("texts", "references", "words"),
    [([], [], "at least one"), (["a"], [], "references of 0"), (["a"], [[]], "has no reference")],
)
def test_what_cannot_be_scored_is_refused(texts, references, words):
    with pytest.raises(RequestError, match=words):
        score_texts(texts, references)


def test_matthews_is_that_of_the_four_counts():
    generator = np.random.default_rng(0)
    labels, predictions = generator.integers(0, 2, (2, 40))
    tp, tn, fp, fn = (
        int(np.sum((labels == x) & (predictions == y))) for x, y in ((1, 1), (0, 0), (0, 1), (1, 0))
    )
    wanted = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert matthews(labels, predictions) == pytest.approx(wanted)
    assert matthews(labels, np.ones(40)) == 0.0


def test_pearson_is_that_of_numpy():
    x, y = np.random.default_rng(0).standard_normal((2, 30))
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
