"""GLUE (Wang et al. 2018, arXiv:1804.07461): one task's folder of TSV files, as GLUE gives it."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.data.examples import Examples, Splits, make_splits
from lora_jax.data.files import sort_labels
from lora_jax.data.tables import nearest_name, read_lines

TRAIN, DEV = ("train.tsv",), ("dev.tsv",)
MATCHED, MISMATCHED = ("dev_matched.tsv",), ("dev_mismatched.tsv",)


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """Where a task's files have what: columns of one or two texts and of the label.

    `header` names the columns where the file does not; of each split's files the first that is
    there is read; `metrics` are those other than accuracy that judge the task; `labels` are the
    known ones of a file without a header, by which another task's file is recognized.
    """

    texts: tuple[str, ...]
    label: str = "label"
    header: tuple[str, ...] = ()
    train: tuple[str, ...] = TRAIN
    validation: tuple[str, ...] = DEV
    test: tuple[str, ...] = DEV
    target: str = "class"
    metrics: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()


_SENTENCES = ("sentence1", "sentence2")
_MNLI = GlueTask(_SENTENCES, "gold_label", validation=MATCHED, test=MATCHED)
_MRPC_TEST = (*DEV, "msr_paraphrase_test.txt")
GLUE_TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask(
        ("sentence",),
        header=("source", "label", "star", "sentence"),
        metrics=("matthews",),
        labels=("0", "1"),
    ),
    "sst2": GlueTask(("sentence",)),
    "mrpc": GlueTask(
        ("#1 String", "#2 String"),
        "Quality",
        train=(*TRAIN, "msr_paraphrase_train.txt"),
        validation=_MRPC_TEST,
        test=_MRPC_TEST,
    ),
    "stsb": GlueTask(_SENTENCES, "score", target="number", metrics=("pearson",)),
    "qqp": GlueTask(("question1", "question2"), "is_duplicate"),
    "mnli": _MNLI,
    "mnli-mm": dataclasses.replace(_MNLI, test=MISMATCHED),
    "qnli": GlueTask(("question", "sentence")),
    "rte": GlueTask(_SENTENCES),
}


def glue_task(name: str) -> GlueTask:
    """The task of this name. Raises `RequestError` with the nearest."""
    if name not in GLUE_TASKS:
        raise RequestError(
            f"data.task={name!r} is no GLUE task{nearest_name(str(name), list(GLUE_TASKS))}; "
            f"choose among {', '.join(GLUE_TASKS)}"
        )
    return GLUE_TASKS[name]


def load_glue(path: str, name: str) -> Splits:
    """The examples of the task `name` in the folder `path`, in the files' order.

    GLUE keeps its test labels to itself, so validation and test are both the dev set (for
    "mnli-mm", test is the mismatched one): a test score is of the examples that chose the step, as
    the LoRA paper's are. MRPC without a dev.tsv takes its original test file for both. Lines with
    too few columns are left out and counted in the notes (QQP has some). Raises `RequestError` for
    a missing file or column, an empty text, a label that is none.
    """
    task = glue_task(name)
    if not path:
        raise RequestError(f"data.source=glue needs data.path: the folder of {name}'s TSV files")
    folder = Path(path).expanduser()
    splits = ("train", "validation", "test")
    files = {split: _find(folder, getattr(task, split)) for split in splits}
    read = {file: read_glue(file, task) for file in files.values()}
    notes = [
        f"validation and test of {name} are both {files['test'].name}, whose labels are public"
        if files["validation"] == files["test"]
        else f"validation of {name} is {files['validation'].name}, test {files['test'].name}"
    ]
    rows = {}
    for split, file in files.items():
        rows[split], dropped = read[file]
        if dropped and split != "test":
            notes.append(f"{dropped} lines of {file.name} lack columns and were left out")
    names: tuple[str, ...] = ()
    if task.target == "class":
        names = sort_labels({label for _, label, _ in rows["train"]})
    parts = {split: _examples(rows[split], task, names) for split in rows}
    return make_splits(
        **parts, label_names=names, notes=notes, target=task.target, metrics=task.metrics
    )


def read_glue(file: Path, task: GlueTask) -> tuple[list[tuple[tuple[str, ...], str, str]], int]:
    """`(texts, label, "file:line")` of each line, and how many lines lacked columns."""
    rows, dropped, header = [], 0, task.header
    for number, line in read_lines(file):
        fields = line.rstrip("\r\n").split("\t")  # nothing is quoted in GLUE
        place = f"{file}:{number}"
        if not header:
            header = tuple(fields)
            if missing := [name for name in (*task.texts, task.label) if name not in header]:
                raise RequestError(
                    f"{place}: no column {missing[0]!r}{nearest_name(missing[0], header)}; data."
                    "task must be the folder's task"
                )
            continue
        if len(fields) < len(header):
            dropped += bool(line.strip())
            continue
        record = dict(zip(header, fields, strict=False))
        texts = tuple(record[name].strip() for name in task.texts)
        label = record[task.label].strip()
        if not all(texts) or not label:
            raise RequestError(f"{place}: an empty text or label; fill it or remove the line")
        if task.labels and label not in task.labels:
            raise RequestError(
                f"{place}: label {label!r} is none of {', '.join(task.labels)}; data.task must be "
                "the folder's task"
            )
        rows.append((texts, label, place))
    if not rows:
        raise RequestError(f"{file} holds no examples; put the task's own file there")
    return rows, dropped


def _find(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    what = f"it has {', '.join(there[:8]) or 'no files'}" if folder.is_dir() else "no such folder"
    raise RequestError(
        f"data.path={folder}: no {' or '.join(names)} ({what}); name a folder of GLUE's own layout"
    )


def _examples(rows, task: GlueTask, names: tuple[str, ...]) -> Examples:
    if task.target == "number":
        labels = np.array([_score(label, place) for _, label, place in rows], np.float32)
    else:
        labels = np.array([_class(label, place, names) for _, label, place in rows], np.int32)
    return Examples(
        texts=tuple(texts[0] for texts, _, _ in rows),
        labels=labels,
        ids=tuple(place for _, _, place in rows),
        seconds=tuple(texts[1] for texts, _, _ in rows) if len(task.texts) == 2 else None,
    )


def _class(label: str, place: str, names: tuple[str, ...]) -> int:
    if label not in names:
        raise RequestError(
            f"{place}: label {label!r} is not in training ({', '.join(names)}); correct it"
        )
    return names.index(label)


def _score(label: str, place: str) -> float:
    try:
        score = float(label)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise RequestError(f"{place}: the score is {label!r}, not a number; correct it")
    return score
