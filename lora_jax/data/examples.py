"""Labelled texts in three splits: what every source of data gives, and its hash."""

import collections
import dataclasses
import hashlib
import html
import re
from collections.abc import Sequence

import numpy as np

from lora_jax.core.errors import RequestError


@dataclasses.dataclass(frozen=True)
class Examples:
    """Texts with their labels: `texts` N strings, `labels` (N,) int32, `ids` N names of origin."""

    texts: tuple[str, ...]
    labels: np.ndarray
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int]) -> "Examples":
        """The examples at `indices`, in that order."""
        return Examples(
            texts=tuple(self.texts[i] for i in indices),
            labels=self.labels[np.asarray(indices, np.int64)],
            ids=tuple(self.ids[i] for i in indices),
        )


@dataclasses.dataclass(frozen=True)
class Splits:
    """Training, validation and test examples; `labels` index into `label_names`.

    `data_hash` is the hex SHA-256 of names, texts and labels in their order; `notes` are sentences
    about what was done on the way (duplicates dropped, splits cut), fit to be shown to a user.
    """

    train: Examples
    validation: Examples
    test: Examples
    label_names: tuple[str, ...]
    data_hash: str
    notes: tuple[str, ...] = ()


def make_splits(
    train: Examples,
    validation: Examples,
    test: Examples,
    *,
    label_names: Sequence[str],
    notes: Sequence[str] = (),
) -> Splits:
    """Puts three splits together and hashes them."""
    data_hash = hash_splits({"train": train, "validation": validation, "test": test}, label_names)
    return Splits(train, validation, test, tuple(label_names), data_hash, tuple(notes))


def hash_splits(splits: dict[str, Examples], label_names: Sequence[str]) -> str:
    """Hex SHA-256 over label names and each split's texts and labels, in order; ids do not count.

    Every string is preceded by its length, so no two different data sets give the same bytes.
    """
    digest = hashlib.sha256(b"lora_jax splits 1\n")

    def add(text: str) -> None:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)

    digest.update(len(label_names).to_bytes(8, "little"))
    for name in label_names:
        add(name)
    for name, examples in splits.items():
        add(name)
        digest.update(len(examples).to_bytes(8, "little"))
        for text in examples.texts:
            add(text)
        digest.update(examples.labels.astype("<i4").tobytes())
    return digest.hexdigest()


def limit_examples(examples: Examples, limit: int) -> Examples:
    """At most `limit` examples in the classes' proportions, in their order; 0 keeps all.

    Which ones depends on the texts alone, and a smaller limit takes a subset of a larger one's.
    Raises `RequestError` if the limit is negative or leaves a class out.
    """
    if limit < 0:
        raise RequestError(f"data.limit is {limit}; give a positive number, or 0 for all examples")
    if limit == 0 or limit >= len(examples):
        return examples
    counts = collections.Counter(examples.labels.tolist())
    seen: collections.Counter = collections.Counter()
    place = {}
    for i in sorted(range(len(examples)), key=lambda i: hash_order("limit", examples.texts[i])):
        label = int(examples.labels[i])
        # Quantile within the class: cutting all classes at one quantile keeps their proportions.
        place[i] = ((seen[label] + 0.5) / counts[label], label)
        seen[label] += 1
    kept = sorted(sorted(place, key=place.__getitem__)[:limit])
    if missing := len(counts) - len({int(examples.labels[i]) for i in kept}):
        raise RequestError(
            f"data.limit={limit} leaves {missing} of {len(counts)} labels without a training "
            "example; raise it"
        )
    return examples.take(kept)


def clean_text(text: str) -> str:
    """`text` with character references resolved and runs of white space made one blank."""
    return " ".join(html.unescape(text).split())


def text_key(text: str) -> str:
    """What two texts share when a reader would call them the same: words, case and marks aside."""
    words = re.sub(r"[\W_]+", " ", text.casefold()).strip()
    return words or text


def hash_order(salt: str, text: str) -> bytes:
    """A sort key that shuffles: the same for the same text on every machine and in every run."""
    return hashlib.sha256(f"{salt}\n{text}".encode("utf-8", "surrogatepass")).digest()
