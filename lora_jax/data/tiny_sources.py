"""Small data made in code for smoke runs: sentences about films, in words the tiny models know."""

import itertools

import numpy as np

from lora_jax.data.examples import (
    Examples,
    Splits,
    completion_examples,
    hash_order,
    make_splits,
)
from lora_jax.data.glue import glue_task

SUBJECTS = ("story", "acting", "music", "script")
QUALITIES = ("good", "fine", "clever", "funny", "bad", "dull", "slow", "weak")
TEMPLATES = (
    "the {0} is {1} and the {2} is {3} .",
    "a film with {1} {0} and with {3} {2} .",
)
# How many facts go to each split.
SIZES = {"train": 60, "validation": 10, "test": 10}

Fact = tuple[str, str, str, str]


def load_tiny_pairs() -> Splits:
    """160 pairs such as "story : good | music : slow", in the manner of E2E; always the same.

    Each prompt has a completion by every template, and none is in two splits.
    """
    parts = {}
    for name, facts in _facts().items():
        pairs = [
            ("{} : {} | {} : {}".format(*fact), template.format(*fact))
            for fact in facts
            for template in TEMPLATES
        ]
        prompts, completions = zip(*pairs, strict=True)
        parts[name] = completion_examples(prompts, completions, _ids("tiny-pairs", name, pairs))
    return make_splits(**parts, target="text")


def load_tiny_glue(task_name: str) -> Splits:
    """80 examples in the form of a GLUE task: as many texts, its kind of label, its metrics.

    A class is how many of the two things said are good (at most one, of two classes); a number that
    count by 2.5. Raises `RequestError` for an unknown task.
    """
    task = glue_task(task_name)
    classes = 3 if task_name.startswith("mnli") else 2
    good = set(QUALITIES[: len(QUALITIES) // 2])
    parts = {}
    for name, facts in _facts().items():
        counts = np.array([sum(word in good for word in fact[1::2]) for fact in facts])
        number = task.target == "number"
        pair = len(task.texts) == 2
        parts[name] = Examples(
            texts=tuple(("the {0} is {1} ." if pair else TEMPLATES[0]).format(*f) for f in facts),
            labels=(2.5 * counts).astype(np.float32)
            if number
            else np.minimum(counts, classes - 1).astype(np.int32),
            ids=_ids(f"tiny-glue/{task_name}", name, facts),
            seconds=tuple("the {2} is {3} .".format(*f) for f in facts) if pair else None,
        )
    names = () if task.target == "number" else tuple(map(str, range(classes)))
    return make_splits(**parts, label_names=names, target=task.target, metrics=task.metrics)


def _facts() -> dict[str, list[Fact]]:
    facts = [
        (first, quality, second, other)
        for first, second in itertools.combinations(SUBJECTS, 2)
        for quality, other in itertools.permutations(QUALITIES, 2)
    ]
    drawn = iter(sorted(facts, key=lambda fact: hash_order("tiny pairs 1", " ".join(fact))))
    return {name: list(itertools.islice(drawn, size)) for name, size in SIZES.items()}


def _ids(source: str, name: str, examples: list) -> tuple[str, ...]:
    return tuple(f"{source}/{name}/{number}" for number in range(len(examples)))
