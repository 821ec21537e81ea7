"""People's own files: one file split automatically, or a file for each split."""

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.data.examples import (
    Examples,
    Splits,
    class_examples,
    completion_examples,
    hash_order,
    make_splits,
    text_key,
)
from lora_jax.data.tables import EXTENSIONS, Row, nearest_name, read_rows

# What each split is called in file names; training comes first, since it must be there.
SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "eval"),
    "test": ("test", "testing"),
}
# One text in ten goes to each split that has no file of its own.
FRACTION = 0.1
SALT = "automatic split 1"


def load_files(
    source: str, path: str, *, text_column: str, label_column: str, target: str = "class"
) -> Splits:
    """Splits from `path`: a file, a folder, or a pattern such as "reviews/*.csv".

    A single file is split 80/10/10 by the hash of each text, so that equal texts (case and
    punctuation aside) stay together and no seed matters. Several files are recognized by the words
    train, validation (valid, val, dev, eval) and test in their names; several for one split are
    read in the order of their names, and a split without a file is taken from training.
    `label_names` are sorted, as numbers where all are whole numbers. With `target` "text" the texts
    are prompts and the labels their completions, with "number" the labels are numbers. Raises
    `RequestError`.
    """
    rows, notes = {}, []
    for name, files in find_files(source, path).items():
        rows[name] = [
            row
            for file in files
            for row in read_rows(
                file, source, text_column=text_column, label_column=label_column, target=target
            )
        ]
    missing = [name for name in ("test", "validation") if name not in rows]
    if missing:
        rows |= cut_from_training(rows["train"], missing, path)
        notes.append(
            f"{' and '.join(missing)} taken from the training texts by hash "
            f"({', '.join(str(len(rows[name])) for name in missing)} of "
            f"{sum(len(rows[name]) for name in ('train', *missing))})"
        )
    train_keys = {text_key(row.text) for row in rows["train"]}
    for name in ("validation", "test"):
        if shared := sum(text_key(row.text) in train_keys for row in rows[name]):
            notes.append(f"{shared} of {len(rows[name])} {name} texts are also in training")
    label_names: tuple[str, ...] = ()
    if target == "class":
        label_names = sort_labels({row.label for row in rows["train"]})
        check_labels(rows, label_names, label_column, path)
    train, validation, test = (
        to_examples(rows[name], label_names, target=target)
        for name in ("train", "validation", "test")
    )
    return make_splits(train, validation, test, label_names=label_names, notes=notes, target=target)


def find_files(source: str, path: str) -> dict[str, list[Path]]:
    """The files of each split: {"train": [...], ...}; training is always among them."""
    if not path:
        raise RequestError(
            f"data.source={source} needs data.path: a file, a folder or a pattern "
            f"(such as data.path=reviews{EXTENSIONS[source][0]})"
        )
    expanded = Path(os.path.expanduser(path))
    if expanded.is_file():
        return {"train": [expanded]}
    if expanded.is_dir():
        files = sorted(f for f in expanded.iterdir() if f.suffix.lower() in EXTENSIONS[source])
        wanted = f"{'/'.join(EXTENSIONS[source])} file"
    else:
        files = sorted(Path(f) for f in glob.glob(str(expanded), recursive=True))
        files = [file for file in files if file.is_file()]
        wanted = "file"
    if not files:
        near = nearest_name(expanded.name, [f.name for f in _siblings(expanded)])
        raise RequestError(f"data.path={path}: no {wanted} found{near}")
    if len(files) == 1:
        return {"train": files}
    splits: dict[str, list[Path]] = {}
    for file in files:
        splits.setdefault(split_of(file), []).append(file)
    if "train" not in splits:
        names = ", ".join(file.name for file in files)
        raise RequestError(
            f"data.path={path}: none of {names} has 'train' in its name; rename it, or name one "
            "file to have it split"
        )
    return splits


def split_of(file: Path) -> str:
    """The split whose word stands in the file's name, as in train.csv or dev-00001-of-00002.csv."""
    words = re.split(r"[^a-z]+", file.name.lower())
    found = [split for split, names in SPLIT_WORDS.items() if set(names) & set(words)]
    if len(found) != 1:
        says = "names no split" if not found else f"names the splits {' and '.join(found)}"
        raise RequestError(
            f"{file} {says}; files that stand together need one of train, validation or test in "
            "their names"
        )
    return found[0]


def cut_from_training(rows: Sequence[Row], names: Sequence[str], path: str) -> dict[str, list[Row]]:
    """`rows` without, and each of `names` with, a tenth of the distinct texts; order kept.

    The texts' hash decides, not a generator. Raises `RequestError` with fewer than three texts.
    """
    keys = sorted({text_key(row.text) for row in rows}, key=lambda key: hash_order(SALT, key))
    if len(keys) <= len(names):
        raise RequestError(
            f"{path} holds {len(keys)} distinct texts: too few to take {' and '.join(names)} from"
        )
    each = max(1, round(FRACTION * len(keys)))
    split = {key: names[i // each] for i, key in enumerate(keys[: each * len(names)])}
    parts: dict[str, list[Row]] = {name: [] for name in ("train", *names)}
    for row in rows:
        parts[split.get(text_key(row.text), "train")].append(row)
    return parts


def sort_labels(labels: set[str]) -> tuple[str, ...]:
    """Labels in order: as numbers where all are whole numbers, as words otherwise."""
    numeric = all(re.fullmatch(r"-?(0|[1-9]\d*)", label) for label in labels)
    return tuple(sorted(labels, key=int if numeric else None))


def check_labels(
    rows: dict[str, list[Row]], label_names: Sequence[str], column: str, path: str
) -> None:
    """Raises `RequestError` for a single class, or a label that training never shows."""
    if len(label_names) < 2:
        raise RequestError(
            f"{path}: every training row has the label {label_names[0]!r} in column {column!r}; "
            "classification needs at least two labels"
        )
    for name in ("validation", "test"):
        for row in rows[name]:
            if row.label not in label_names:
                few = ", ".join(repr(label) for label in label_names[:8])
                more = ", ..." if len(label_names) > 8 else ""
                raise RequestError(
                    f"{row.place}: label {row.label!r} of the {name} split is not in training "
                    f"({few}{more}); correct it, or give training an example of it"
                )


def to_examples(
    rows: Sequence[Row], label_names: Sequence[str], *, target: str = "class"
) -> Examples:
    """Examples whose ids are the rows' places."""
    texts, places = tuple(row.text for row in rows), tuple(row.place for row in rows)
    if target == "text":
        return completion_examples(texts, [row.label for row in rows], places)
    if target == "number":
        labels = np.array([float(row.label) for row in rows], np.float32)
        return Examples(texts=texts, labels=labels, ids=places)
    number = {name: i for i, name in enumerate(label_names)}
    return class_examples((row.text, number[row.label], row.place) for row in rows)


def _siblings(path: Path) -> list[Path]:
    parent = path.parent
    return sorted(parent.iterdir()) if parent.is_dir() else []
