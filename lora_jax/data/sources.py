"""Where the data of a run comes from, by its configuration."""

from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.data.examples import Splits, limit_examples, make_splits
from lora_jax.data.files import load_files
from lora_jax.data.reviews import load_reviews
from lora_jax.data.tables import EXTENSIONS, nearest_name

SOURCES = ("reviews", *EXTENSIONS)


def load_splits(data: Any) -> Splits:
    """Training, validation and test examples of `config.data` (a ConfigDict or alike).

    Reads `source`, `path`, `text`, `label` and `limit` of it; `limit` cuts the training examples
    only, and the hash is that of what is left. No seed takes part. Raises `RequestError`.
    """
    if data.source == "reviews":
        if data.path:
            raise RequestError(
                f"data.path={data.path} means nothing to data.source=reviews; set data.source to "
                f"the file's kind ({', '.join(EXTENSIONS)})"
            )
        splits = load_reviews()
    elif data.source in EXTENSIONS:
        splits = load_files(data.source, data.path, text_column=data.text, label_column=data.label)
    else:
        raise RequestError(
            f"data.source={data.source!r} is unknown{nearest_name(str(data.source), SOURCES)}; "
            f"choose among {', '.join(SOURCES)}"
        )
    train = limit_examples(splits.train, data.limit)
    if train is splits.train:
        return splits
    return make_splits(
        train,
        splits.validation,
        splits.test,
        label_names=splits.label_names,
        notes=(*splits.notes, f"training limited to {len(train)} of {len(splits.train)} examples"),
    )
