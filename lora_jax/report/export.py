"""Finished runs without their weights: small enough to commit, all that a report needs."""

import os
from pathlib import Path

from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import atomic_folder
from lora_jax.io.paths import at_home
from lora_jax.io.untrusted import read_regular
from lora_jax.report.runs import read_runs

KEPT = ("card.json", "metrics.jsonl", "test_predictions.npz")


def keep_runs(workdir: str | os.PathLike, folder: str | os.PathLike) -> int:
    """Copies card, metrics and predictions of each finished run to `folder`/cells; counts them.

    Checkpoints and adapters stay behind: `folder` is a workdir for `read_runs` of some 20 KB a run.
    Of a failed cell the config and the error are kept. A run that `folder` has already, with the
    same card, is passed over.

    Raises:
      RequestError: no finished run in `workdir`, or `folder` holds another run of that name; then
        nothing is copied.
    """
    folder = at_home(folder)
    runs = read_runs(workdir)
    finished = {run.name: run.folder for run in runs if run.finished}
    # A cell that failed has no result, but its pack cannot be trained again without it.
    failed = {run.name: run.folder for run in runs if (run.folder / "failure.json").exists()}
    if not finished:
        raise RequestError(f"no run in {workdir} has finished; there is nothing to keep yet")
    cells = Path(folder) / "cells"
    there = {name for name in finished if (cells / name).exists()}
    for name in there:
        kept, found = cells / name / "card.json", finished[name] / "card.json"
        if not kept.exists() or kept.read_bytes() != found.read_bytes():
            raise RequestError(f"{cells / name} is another run; remove it or keep to a new folder")
    for name, folder_of in failed.items():
        if not (cells / name).exists():
            with atomic_folder(cells / name) as temporary:
                for file in ("config.json", "failure.json"):
                    _copy(folder_of / file, temporary / file)
    for name in finished.keys() - there:
        with atomic_folder(cells / name) as temporary:
            for file in KEPT:
                if (finished[name] / file).exists():
                    _copy(finished[name] / file, temporary / file)
    return len(finished)


def _copy(path: Path, to: Path) -> None:
    """Copies a file of a run. Raises `RequestError` for a link: it may lead to what nobody gave."""
    if path.is_symlink():
        raise RequestError(f"{path} is a link to {os.readlink(path)!r}; put the file in its place")
    try:
        to.write_bytes(read_regular(path))
    except OSError as error:
        raise RequestError(f"cannot copy {path}: {error.strerror or error}") from error
