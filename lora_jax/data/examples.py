"""Texts with their targets in three splits: what every source of data gives, and its hash."""

import collections
import dataclasses
import hashlib
import html
import re
from collections.abc import Iterable, Sequence

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.settings import check

# What a model learns to give for a text: one of some classes, a number, or another text.
TARGETS = ("class", "number", "text")


@dataclasses.dataclass(frozen=True)
class Examples:
    """Texts with their targets: `texts` N strings, `ids` N names of origin.

    `seconds` holds N texts more, or is None: of classes and numbers, what belongs to each text
    (a question's sentence); of completions, the completion of the prompt in `texts`. `labels` (N,)
    are class indices, int32; numbers, float32; of completions the number of the prompt among the
    split's distinct ones, int32: those that share it are each other's references.
    """

    texts: tuple[str, ...]
    labels: np.ndarray
    ids: tuple[str, ...]
    seconds: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, index: int) -> str:
        """All that example `index` reads, as one string."""
        second = () if self.seconds is None else (self.seconds[index],)
        return "\n".join((self.texts[index], *second))

    def take(self, indices: Sequence[int]) -> "Examples":
        """The examples at `indices`, in that order."""
        return Examples(
            texts=tuple(self.texts[i] for i in indices),
            labels=self.labels[np.asarray(indices, np.int64)],
            ids=tuple(self.ids[i] for i in indices),
            seconds=None if self.seconds is None else tuple(self.seconds[i] for i in indices),
        )


def class_examples(rows: Iterable[tuple[str, int, str]]) -> Examples:
    """Examples of `(text, class index, id)`."""
    rows = list(rows)
    labels = np.array([label for _, label, _ in rows], np.int32)
    return Examples(tuple(text for text, _, _ in rows), labels, tuple(name for _, _, name in rows))


def of_one_label(
    texts: Sequence[str], labels: Sequence[int], *, repeated: str, conflicting: str
) -> tuple[list[int], list[str]]:
    """`(indices, notes)`: the first of equal texts (see `text_key`) that all have one label, in
    order, and how many were dropped, in the words given."""
    labels_of: dict[str, set[int]] = collections.defaultdict(set)
    first: dict[str, int] = {}
    for index, (text, label) in enumerate(zip(texts, labels, strict=True)):
        labels_of[text_key(text)].add(label)
        first.setdefault(text_key(text), index)
    kept = [index for key, index in first.items() if len(labels_of[key]) == 1]
    counts = {repeated: len(texts) - len(first), conflicting: len(first) - len(kept)}
    return kept, [f"{count} {what}" for what, count in counts.items() if count]


def completion_examples(
    prompts: Sequence[str], completions: Sequence[str], ids: Sequence[str]
) -> Examples:
    """Prompts and their completions as examples, N each; equal prompts get one label.

    >>> completion_examples(["a", "b", "a"], ["x", "y", "z"], ["1", "2", "3"]).labels.tolist()
    [0, 1, 0]
    """
    number = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    labels = np.array([number[prompt] for prompt in prompts], np.int32)
    return Examples(tuple(prompts), labels, tuple(ids), seconds=tuple(completions))


def references_of(examples: Examples) -> dict[str, tuple[str, ...]]:
    """The completions of each distinct prompt, prompts and completions in order of appearance.

    What text generated for a prompt is measured against. Raises `RequestError` where the examples
    have no completions.

    >>> references_of(completion_examples(["a", "b", "a"], ["x", "y", "z"], ["1", "2", "3"]))
    {'a': ('x', 'z'), 'b': ('y',)}
    """
    if examples.seconds is None:
        raise RequestError("these examples have no completions; load them with target='text'")
    found: dict[str, list[str]] = {}
    for prompt, completion in zip(examples.texts, examples.seconds, strict=True):
        found.setdefault(prompt, []).append(completion)
    return {prompt: tuple(completions) for prompt, completions in found.items()}


@dataclasses.dataclass(frozen=True)
class Splits:
    """Training, validation and test examples; labels of classes index into `label_names`.

    `data_hash` is the hex SHA-256 of names, texts and labels in their order; `notes` are sentences
    about what was done on the way (duplicates dropped, splits cut), fit to be shown to a user.
    `target` is one of `TARGETS`; `metrics` names what the data are judged by in addition to loss
    and accuracy (see `train.task_metrics`).
    """

    train: Examples
    validation: Examples
    test: Examples
    label_names: tuple[str, ...]
    data_hash: str
    notes: tuple[str, ...] = ()
    target: str = "class"
    metrics: tuple[str, ...] = ()


def make_splits(
    train: Examples,
    validation: Examples,
    test: Examples,
    *,
    label_names: Sequence[str] = (),
    notes: Sequence[str] = (),
    target: str = "class",
    metrics: Sequence[str] = (),
) -> Splits:
    """Puts three splits together and hashes them."""
    data_hash = hash_splits({"train": train, "validation": validation, "test": test}, label_names)
    names = tuple(label_names)
    return Splits(train, validation, test, names, data_hash, tuple(notes), target, tuple(metrics))


def hash_splits(splits: dict[str, Examples], label_names: Sequence[str]) -> str:
    """Hex SHA-256 over label names and each split's texts and labels, in order; ids do not count.

    Every string is preceded by its length, so no two different data sets give the same bytes.
    """
    paired = any(examples.seconds is not None for examples in splits.values())
    digest = hashlib.sha256(b"lora_jax splits of pairs 1\n" if paired else b"lora_jax splits 1\n")

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
        for text in examples.seconds or ():
            add(text)
        numbers = np.issubdtype(examples.labels.dtype, np.floating)
        if numbers:
            add("numbers")
        digest.update(examples.labels.astype("<f4" if numbers else "<i4").tobytes())
    return digest.hexdigest()


def limit_examples(
    examples: Examples, limit: int, *, target: str = "class", every_class: bool = True
) -> Examples:
    """At most `limit` examples in their order, classes in their proportions; 0 keeps all.

    Which ones depends on the texts alone, and a smaller limit takes a subset of a larger one's.
    Raises `RequestError` if the limit is negative or, with `every_class`, leaves a class out.
    """
    check("data.limit", limit)
    if limit == 0 or limit >= len(examples):
        return examples
    order = sorted(range(len(examples)), key=lambda i: hash_order("limit", examples.text(i)))
    if target != "class":
        return examples.take(sorted(order[:limit]))
    counts = collections.Counter(examples.labels.tolist())
    seen: collections.Counter = collections.Counter()
    place = {}
    for i in order:
        label = int(examples.labels[i])
        # Quantile within the class: cutting all classes at one quantile keeps their proportions.
        place[i] = ((seen[label] + 0.5) / counts[label], label)
        seen[label] += 1
    kept = sorted(sorted(place, key=place.__getitem__)[:limit])
    missing = len(counts) - len({int(examples.labels[i]) for i in kept})
    if missing and every_class:
        raise RequestError(
            f"data.limit={limit} leaves {missing} of {len(counts)} labels without a training "
            "example; raise it"
        )
    return examples.take(kept)


def limit_evaluation(examples: Examples, limit: int, *, target: str) -> Examples:
    """`limit_examples` for a split that is only looked at: prompts keep all of their completions.

    A text is judged by every reference of its prompt, so of pairs whole prompts are taken, in an
    order that depends on them alone, while they fit into `limit` pairs (one prompt at least). A
    rare class may be left out.
    """
    check("data.eval_limit", limit)
    if target != "text" or limit == 0 or limit >= len(examples):
        return limit_examples(examples, limit, target=target, every_class=False)
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(examples.texts):
        groups.setdefault(prompt, []).append(i)
    kept: list[int] = []
    for prompt in sorted(groups, key=lambda prompt: hash_order("limit", prompt)):
        if not kept or len(kept) + len(groups[prompt]) <= limit:
            kept += groups[prompt]
    return examples.take(sorted(kept))


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
