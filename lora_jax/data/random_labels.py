"""WordNet's glosses made hard: labels that mean nothing, words that mean something else.

What an adapter of small rank should find difficult, for experiments on where LoRA fails. Random
labels are those of Zhang et al. 2017 (arXiv:1611.03530), which can only be memorised; exchanged
words are a shift of domain that leaves lengths, word counts and the structure of sentences alone.
"""

from __future__ import annotations

import collections
import re

import numpy as np

from lora_jax.data.examples import Examples, Splits, hash_order, make_splits
from lora_jax.data.wordnet import LABEL_NAMES, load_wordnet

_WORD = re.compile(r"[a-z]+")
# A word takes the place of one about as common: neighbours in the order of frequency.
BLOCK = 64


def load_random_labels(path: str = "") -> Splits:
    """WordNet's training glosses with labels drawn at random from its 26 domains, all as likely.

    Training, validation and test are the SAME glosses with the same labels, since nothing can be
    generalised: what is evaluated is what was memorised. Labels are drawn by a hash of the text,
    so they depend on no seed; data.limit and data.eval_limit, set alike, cut all three alike.
    Raises `RequestError` as `load_wordnet` does.
    """
    whole = load_wordnet(path).train
    labels = [
        int.from_bytes(hash_order("random label", text)[:8], "big") % len(LABEL_NAMES)
        for text in whole.texts
    ]
    drawn = Examples(whole.texts, np.array(labels, np.int32), whole.ids)
    notes = ["labels drawn at random; validation and test are the training glosses again"]
    return make_splits(drawn, drawn, drawn, label_names=LABEL_NAMES, notes=notes)


def load_exchanged_words(path: str = "") -> Splits:
    """WordNet's glosses, splits and labels, each word replaced throughout by another word.

    The replacement is one-to-one, among words about as common, and the same everywhere; texts are
    lower case. It depends on no seed. Raises `RequestError` as `load_wordnet` does.
    """
    splits = load_wordnet(path)
    parts = (splits.train, splits.validation, splits.test)
    other = exchange(text for part in parts for text in part.texts)

    def exchanged(examples: Examples) -> Examples:
        texts = (
            _WORD.sub(lambda found: other[found[0]], text.casefold()) for text in examples.texts
        )
        return Examples(tuple(texts), examples.labels, examples.ids)

    notes = (*splits.notes, f"{len(other)} words replaced by others about as common")
    return make_splits(*map(exchanged, parts), label_names=LABEL_NAMES, notes=notes)


def exchange(texts) -> dict[str, str]:
    """`{word: other}`, one-to-one on the words of `texts`: neighbours by frequency change places.

    Within each block of 64 words a word takes the place of the next in an order by hash, so that
    none stays (but one that is alone in the last block).

    >>> sorted(exchange(["a cat", "a dog"]).items())
    [('a', 'cat'), ('cat', 'dog'), ('dog', 'a')]
    """
    counts = collections.Counter(word for text in texts for word in _WORD.findall(text.casefold()))
    by_count = sorted(counts, key=lambda word: (-counts[word], word))
    other = {}
    for start in range(0, len(by_count), BLOCK):
        block = by_count[start : start + BLOCK]
        order = sorted(block, key=lambda word: hash_order("another word", word))
        other.update(zip(order, [*order[1:], order[0]], strict=True))
    return other
