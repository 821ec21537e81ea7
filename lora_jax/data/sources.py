"""Where the data of a run comes from, by its configuration."""

from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.data.e2e import load_e2e
from lora_jax.data.examples import Splits, limit_evaluation, limit_examples, make_splits
from lora_jax.data.files import load_files
from lora_jax.data.glue import load_glue
from lora_jax.data.newsgroups import load_newsgroups
from lora_jax.data.random_labels import load_exchanged_words, load_random_labels
from lora_jax.data.reviews import load_reviews
from lora_jax.data.tables import EXTENSIONS, nearest_name
from lora_jax.data.tiny_sources import load_tiny_glue, load_tiny_pairs
from lora_jax.data.wordnet import load_wordnet

# Those that need no file of the user's.
BUILT_IN = {
    "reviews": lambda data: load_reviews(),
    "tiny-pairs": lambda data: load_tiny_pairs(),
    "tiny-glue": lambda data: load_tiny_glue(_task(data)),
}
# Those that are found by themselves or in a folder at data.path, and those that need one.
IN_FOLDERS = {
    "newsgroups": lambda data: load_newsgroups(data.path),
    "wordnet": lambda data: load_wordnet(data.path),
    "wordnet-2": lambda data: load_wordnet(data.path, second=True),
    "wordnet-random-labels": lambda data: load_random_labels(data.path),
    "wordnet-exchanged-words": lambda data: load_exchanged_words(data.path),
    "e2e": lambda data: load_e2e(data.path),
    "glue": lambda data: load_glue(data.path, _task(data)),
}
SOURCES = (*BUILT_IN, *IN_FOLDERS, *EXTENSIONS)


def _task(data: Any) -> str:
    return getattr(data, "task", "")


_NAMES = {"class": "classes", "number": "numbers", "text": "completions"}
_HEADS = {"class": "classification", "number": "regression", "text": "causal-lm"}


def load_splits(data: Any, *, target: str = "class") -> Splits:
    """Training, validation and test examples of `config.data` (a ConfigDict or alike).

    Reads `source`, `path`, `text`, `label`, `limit` and, of GLUE, `task`; `limit` cuts the training
    examples, `eval_limit` (0 if it is not there) the others, and the hash is that of what is left.
    `target` is what the model is to learn, one of `TARGETS`: it decides how the labels of people's
    own files are read. No seed takes part. Raises `RequestError`, also where the source has no such
    targets.
    """
    if data.source in BUILT_IN:
        if data.path:
            raise RequestError(
                f"data.path={data.path} means nothing to data.source={data.source}; set "
                f"data.source to the file's kind ({', '.join(EXTENSIONS)})"
            )
        splits = BUILT_IN[data.source](data)
    elif data.source in IN_FOLDERS:
        splits = IN_FOLDERS[data.source](data)
    elif data.source in EXTENSIONS:
        splits = load_files(
            data.source,
            data.path,
            text_column=data.text,
            label_column=data.label,
            target=target,
        )
    else:
        raise RequestError(
            f"data.source={data.source!r} is unknown{nearest_name(str(data.source), SOURCES)}; "
            f"choose among {', '.join(SOURCES)}"
        )
    if splits.target != target:
        raise RequestError(
            f"data.source={data.source} has {_NAMES[splits.target]}, and the model's head is for "
            f"{_NAMES[target]}; set model.head={_HEADS[splits.target]}, or another data.source"
        )
    return _limited(splits, data.limit, getattr(data, "eval_limit", 0))


def _limited(splits: Splits, limit: int, eval_limit: int) -> Splits:
    cut = {"train": limit_examples(splits.train, limit, target=splits.target)}
    for name in ("validation", "test"):
        cut[name] = limit_evaluation(getattr(splits, name), eval_limit, target=splits.target)
    notes = [
        f"{name.replace('train', 'training')} limited to {len(kept)} of {len(whole)} examples"
        for name, kept in cut.items()
        if kept is not (whole := getattr(splits, name))
    ]
    if not notes:
        return splits
    return make_splits(
        **cut,
        label_names=splits.label_names,
        target=splits.target,
        metrics=splits.metrics,
        notes=(*splits.notes, *notes),
    )
