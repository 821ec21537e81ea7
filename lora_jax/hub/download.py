"""`pull`: a repository of the hub as a new folder, whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.hub.client import check_repo, talking
from lora_jax.hub.files import PEFT_CONFIG, PEFT_TENSORS, is_ours, leads_outside, sizes
from lora_jax.io.atomic import atomic_folder, check_new
from lora_jax.io.paths import at_home
from lora_jax.train.record import Card

_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class Pulled:
    """What `pull` wrote.

    Attributes:
      folder: in PEFT's format; with a run's record it is also a workdir with one run.
      commit: of the repository, 40 hex digits.
      files: bytes by name in `folder`.
      runs: names of the runs in `cells/` with weights; () for a repository that PEFT wrote.
    """

    folder: Path
    commit: str
    files: Mapping[str, int]
    runs: tuple[str, ...]


def pull(
    repo: str,
    out: str | os.PathLike,
    *,
    revision: str | None = None,
) -> Pulled:
    """Downloads an adapter from the Hugging Face Hub, with the run's record if it has one.

    Files that `push` does not write, such as pickles, are left out. No code is executed.

    Args:
      repo: "owner/name".
      out: the folder to write; it must not exist yet.
      revision: a branch, tag or commit; None is the default branch.

    Returns:
      A `Pulled`. `lj.load_adapter(out)` reads the folder; `lj.predict(out, texts)` and `lora-jax
      verify` need the run's record in it.

    Raises:
      RequestError: `out` exists, the hub refuses, the repository holds no adapter or a file name
        that leads out of the folder, or a file is damaged. Nothing is written then.

    >>> lj.hub.pull("owner/name", "adapter").runs  # doctest: +SKIP
    ('lora-qv-r8',)
    """
    from huggingface_hub import HfApi

    check_repo(repo)
    check_new(out)
    api = HfApi()
    with talking(f"pull {repo}"):
        info = api.model_info(repo, revision=revision, files_metadata=True)
    siblings = {one.rfilename: one for one in info.siblings or ()}
    _check_names(repo, siblings)
    wanted = [one for name, one in sorted(siblings.items()) if is_ours(name)]
    with atomic_folder(out) as folder:
        with talking(f"pull {repo}"):
            _fetch(api, repo, str(info.sha), wanted, folder)
        shutil.rmtree(folder / ".cache", ignore_errors=True)
        for one in wanted:
            _check_complete(repo, folder / one.rfilename, one)
        runs, files = _check_adapter(repo, folder), sizes(folder)
    return Pulled(at_home(out), str(info.sha), files, runs)


def _check_names(repo: str, names: Mapping[str, Any]) -> None:
    if bad := sorted(name for name in names if leads_outside(name)):
        raise RequestError(
            f"{repo} lists a file {bad[0]!r}, which leads out of the folder; nothing was written. "
            "Tell the owner of the repository"
        )
    if missing := [name for name in (PEFT_CONFIG, PEFT_TENSORS) if name not in names]:
        raise RequestError(
            f"{repo} holds no adapter in PEFT's format: it has no {' and no '.join(missing)}; "
            "give a repository that `lora-jax push` or peft's push_to_hub wrote"
        )


def _fetch(api: Any, repo: str, commit: str, wanted: Sequence[Any], folder: Path) -> None:
    """Downloads the files of one commit.

    One by one and not as a snapshot, which would ask for the names again: these are checked.
    """

    def fetch(one: Any) -> None:
        api.hf_hub_download(repo, one.rfilename, revision=commit, local_dir=folder)

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(fetch, wanted))


def _check_complete(repo: str, path: Path, listed: Any) -> None:
    """Raises `RequestError` unless the file is what the repository lists: no link, its size, and
    for large files its sha256."""
    is_file = path.is_file() and not path.is_symlink()
    is_same = is_file and listed.size in (None, path.stat().st_size)
    if is_same and listed.lfs is not None:
        with open(path, "rb") as file:
            is_same = hashlib.file_digest(file, "sha256").hexdigest() == listed.lfs.sha256
    if not is_same:
        raise RequestError(
            f"{listed.rfilename} of {repo} came damaged: it is not what the repository lists; "
            "pull again"
        )


def _check_adapter(repo: str, folder: Path) -> tuple[str, ...]:
    """The runs whose weights are in the folder. Raises `RequestError` for what cannot be read."""
    from lora_jax.peft.config import PeftConfig

    try:
        PeftConfig.read(folder / PEFT_CONFIG)
        for path in folder.glob("cells/*/card.json"):
            Card.read(path)
    except RequestError as error:
        reason = str(error).replace(f"{folder}/", "")
        raise RequestError(f"{repo} holds no adapter that can be read here: {reason}") from error
    return tuple(sorted(path.parent.name for path in folder.glob("cells/*/adapter")))
