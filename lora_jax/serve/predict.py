"""`predict`: from a finished run's folder and new texts to class names, numbers or completions."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lora_jax.core.draws import partitionable
from lora_jax.core.errors import RequestError
from lora_jax.core.lift import lift
from lora_jax.data import Examples
from lora_jax.data.glue import GLUE_TASKS
from lora_jax.data.tables import read_texts
from lora_jax.generate.score import answer
from lora_jax.generate.settings import Decoding
from lora_jax.io.paths import at_home, cell_of
from lora_jax.settings import Settings
from lora_jax.train.adapted import Adapted, load_run_adapter
from lora_jax.train.compilation import CompiledByShape, enable_compilation_cache
from lora_jax.train.evaluate_run import check_completion_format, config_of, encoded_batches
from lora_jax.train.loss import INPUTS
from lora_jax.train.task import task_of
from lora_jax.train.workdir import config_from

Progress = Callable[[int, int], None]
PREDICTION, PROBABILITY = "prediction", "probability_"
# The rows as read, N tuples of one or two texts, and where each stands.
Inputs = tuple[tuple[dict[str, Any], ...], list[tuple[str, ...]], tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Predictions(Sequence):
    """What a run predicts for N inputs; as a sequence, a class name, number or text for each.

    Attributes:
      values: N class names, floats or completions, in the order of the inputs.
      records: the N inputs, as the rows of the file they came from, or `{"text": …}`.
      class_names: the names of the classes, () for numbers and completions.
      probabilities: (N, classes) float32 in the order of `class_names`; None without classes.
    """

    values: tuple[Any, ...]
    records: tuple[dict[str, Any], ...]
    class_names: tuple[str, ...] = ()
    probabilities: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, place):
        return self.values[place]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Each input's record, with `"prediction"` and each `"probability_NAME"` added."""
        for place, value in enumerate(self.values):
            row = {**self.records[place], PREDICTION: value}
            if self.probabilities is not None:
                own = map(float, self.probabilities[place])
                names = (f"{PROBABILITY}{name}" for name in self.class_names)
                row |= dict(zip(names, own, strict=True))
            yield row


def predict(
    run: str | os.PathLike,
    inputs: Sequence[str] | Sequence[tuple[str, str]] | str | os.PathLike,
    *,
    text_column: str | Sequence[str] | None = None,
    merged: bool = False,
    settings: Decoding | None = None,
    on_progress: Progress | None = None,
) -> Predictions:
    """Applies a finished run to new texts: `lj.predict("runs/first/cells/run", ["a fine film"])`.

    Args:
      run: `WORKDIR/cells/NAME`, or a workdir with one run.
      inputs: texts, pairs of texts for a run trained on pairs, or the path of a jsonl, csv, tsv or
        parquet file.
      text_column: of a file, the column of the texts, or the two columns of pairs. None takes the
        run's own setting (`data.text`, or the columns of its GLUE task).
      merged: fold the adapter into the base first; the same up to rounding.
      settings: how a language model decodes its completions; None is greedy, up to 64 tokens.
      on_progress: called with the number of inputs done and N, after each batch.

    Returns:
      `Predictions`: a sequence of class names (classification), floats (regression) or texts
      (causal-lm), with `probabilities` (N, classes) float32 for classes.

    Raises:
      RequestError: the run is unfinished or damaged, its base is not found, an input is empty, or
        a file lacks the column.

    >>> list(lj.predict("runs/cells/lora", ["a fine film"]))  # doctest: +SKIP
    ['positive']
    """
    cell = cell_of(run)
    if not (cell / "card.json").is_file():
        raise RequestError(
            f"{cell} is not finished: it has no card.json; train it to the end, then predict"
        )
    config = config_from(config_of(cell), cell / "config.json")
    columns = text_columns(config.data, text_column)
    if isinstance(inputs, str | os.PathLike):
        records, texts, places = _read(at_home(inputs), columns)
    else:
        records, texts, places = _given(inputs, config.data)
    task = task_of(config.model)
    if task.target == "text" and len(texts[0]) == 2:
        raise RequestError(f"{cell.name} completes prompts, and these inputs are pairs of texts")
    if settings is not None and task.target != "text":
        raise RequestError(f"settings={settings} is for completions; {cell.name} has none")
    enable_compilation_cache()
    adapted = load_run_adapter(cell / "adapter")
    if task.target == "text":
        values = _completions(adapted, cell, texts, settings, merged, on_progress)
        return Predictions(values, records)
    outputs = _outputs(adapted, config, texts, places, merged, on_progress)
    if task.target == "number":
        return Predictions(tuple(map(float, outputs[:, 0])), records)
    names = _class_names(adapted, outputs.shape[1])
    values = tuple(names[k] for k in outputs.argmax(-1))
    return Predictions(values, records, names, np.asarray(jax.nn.softmax(outputs, axis=-1)))


def text_columns(data: Any, given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The columns of the texts: those `given`, or those of the run's `data` section."""
    if given is not None:
        columns = (given,) if isinstance(given, str) else tuple(given)
        if not 1 <= len(columns) <= 2 or not all(columns):
            raise RequestError(f"text_column={given!r}; name one column, or the two of pairs")
        return columns
    task = GLUE_TASKS.get(data.get("task") or "") if "glue" in data.source else None
    return (data.get("text") or "text",) if task is None else task.texts


def _read(path: Path, columns: Sequence[str]) -> Inputs:
    """The inputs in a file."""
    read = read_texts(path, columns)
    taken = [name for name in read[0][0] if name == PREDICTION or name.startswith(PROBABILITY)]
    if taken:
        raise RequestError(
            f"{path} has a column {taken[0]!r} already, which predictions would replace; rename it"
        )
    texts = [tuple(record[name] for name in columns) for record, _ in read]
    return tuple(record for record, _ in read), texts, tuple(place for _, place in read)


def _given(inputs: Any, data: Any) -> Inputs:
    """The inputs given in Python."""
    texts: list[tuple[str, ...]] = [(x,) if isinstance(x, str) else tuple(x) for x in inputs]
    if not texts:
        raise RequestError("inputs are empty; give at least one text")
    # Only of GLUE's tasks is it known how many texts an example has; else all have as many.
    width = len(text_columns(data, None)) if "glue" in data.source else len(texts[0])
    names = ("text",) if width == 1 else ("text", "text2")
    for place, own in enumerate(texts):
        if len(own) != width or not all(isinstance(x, str) and x.strip() for x in own):
            wanted = "a text" if width == 1 else "a pair of texts"
            raise RequestError(f"input {place} is {inputs[place]!r}; this run reads {wanted}")
    records: tuple[dict[str, Any], ...] = tuple(dict(zip(names, t, strict=True)) for t in texts)
    return records, texts, tuple(f"input {place}" for place in range(len(texts)))


def _class_names(adapted: Adapted, count: int) -> tuple[str, ...]:
    """The names of the classes, as the run's adapter keeps them; else their numbers."""
    names = adapted.description.get("label_names")
    known = names if isinstance(names, list) and len(names) == count else range(count)
    return tuple(map(str, known))


def _completions(adapted: Adapted, cell, texts, settings, merged, on_progress) -> tuple[str, ...]:
    description, model = adapted.description, adapted.model
    check_completion_format(description, model, description["model"], cell.name)
    show = None if on_progress is None else lambda done: on_progress(done, len(texts))
    prompts = [text for (text,) in texts]
    trainable, frozen = adapted.merged if merged else (adapted.trainable, adapted.frozen)
    params = adapted.method.bind(trainable, frozen)
    return tuple(answer(model, params, prompts, settings or Decoding(64), show=show))


@partitionable()
def _outputs(
    adapted: Adapted, config: Settings, texts, places, merged: bool, on_progress: Progress | None
) -> np.ndarray:
    """The head's outputs (N, classes) in at least float32, by the batches of an evaluation."""
    method, count = adapted.method, len(texts)
    first, *second = zip(*texts, strict=True)
    examples = Examples(
        texts=first,
        labels=np.zeros(count, np.int32),
        ids=places,
        seconds=second[0] if second else None,
    )
    # A few texts need not fill a batch of the run's evaluation; powers of two compile few shapes.
    largest = 1 << (count - 1).bit_length()
    batches = encoded_batches(config, task_of(config.model), adapted.model, examples, largest)
    trainable, frozen = adapted.merged if merged else (adapted.trainable, adapted.frozen)
    lifted = lift(adapted.model.apply)

    def outputs_of(trainable, frozen, batch):
        inputs = [batch[name] for name in INPUTS if name in batch]
        return lifted(method.bind(trainable, frozen), *inputs)

    program = CompiledByShape(jax.jit(outputs_of))
    found: dict[int, np.ndarray] = {}
    for batch in batches:
        inputs = {name: batch[name] for name in INPUTS if name in batch}
        own = np.asarray(jax.device_get(program(trainable, frozen, inputs)), np.float32)
        found |= {int(n): row for n, row in zip(batch["index"], own, strict=True) if n >= 0}
        if on_progress is not None:
            on_progress(len(found), count)
    outputs = np.stack([found[place] for place in range(count)])
    if not np.isfinite(outputs).all():
        bad = int(np.argmin(np.isfinite(outputs).all(-1)))
        raise RequestError(f"{places[bad]}: the run's output is not finite; evaluate it first")
    return outputs
