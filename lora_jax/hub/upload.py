"""`push`: a finished run as a repository of the hub, in one commit."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.hub.card import is_on_hub, model_card
from lora_jax.hub.client import check_logged_in, check_repo, talking
from lora_jax.hub.files import CARD, copy_record, is_ours, sizes
from lora_jax.io.paths import cell_of
from lora_jax.models import Model
from lora_jax.models.sources import embedded_names
from lora_jax.peft.save import save_adapter
from lora_jax.settings import SETTINGS, flat_config
from lora_jax.train.adapted import Adapted, load_run_adapter
from lora_jax.train.record import Card

LICENCES = "https://huggingface.co/docs/hub/repositories-licenses"
# What a repository may hold before its first push: the hub and its website make these.
_HARMLESS = re.compile(r"\.[\w.-]+|README\.md|LICENSE(\.\w+)?")


@dataclasses.dataclass(frozen=True)
class Pushed:
    """What `push` sent, or would have sent.

    Attributes:
      repo: "owner/name".
      files: bytes by name in the repository.
      card: the model card, README.md.
      notes: what the owner should know, one line each.
      url: of the commit; None if nothing was sent.
    """

    repo: str
    files: Mapping[str, int]
    card: str
    notes: tuple[str, ...]
    url: str | None


def push(
    run: str | os.PathLike,
    repo: str,
    *,
    license: str | None,
    private: bool = False,
    revision: str | None = None,
    base_model: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> Pushed:
    """Pushes a finished run to the Hugging Face Hub: PEFT's folder, a model card, the run's record.

    One commit holds all of it. The token is huggingface_hub's own (`hf auth login`, HF_TOKEN),
    as is the address of the hub (HF_ENDPOINT).

    Args:
      run: `WORKDIR/cells/NAME`, or a workdir with one run.
      repo: "owner/name"; it is created if it does not exist.
      license: the short name on the hub of the adapter's licence, such as "apache-2.0".
      private: create a private repository; an existing one must be private already.
      revision: the branch to push to, created if need be; None is the default branch.
      base_model: the base's name on the hub, for the card and PEFT's config. None takes the name
        that the run has for it, which must not be a folder of this machine.
      force: push to a repository that holds something else; its files stay, README.md apart.
      dry_run: make the files and the card, send nothing.

    Returns:
      A `Pushed`.

    Raises:
      RequestError: the run is unfinished or damaged, PEFT's format cannot hold its method, there
        is no licence or no token, or the hub refuses.

    >>> lj.hub.push("runs/cells/r8", "me/r8", license="mit", dry_run=True).url  # doctest: +SKIP
    """
    check_repo(repo)
    _check_licence(license)
    cell = _finished(run)
    if not dry_run:
        check_logged_in()
    adapted = load_run_adapter(cell / "adapter")
    card = Card.read(cell / "card.json")
    model = _named_as_on_hub(adapted.model, card, base_model)
    with tempfile.TemporaryDirectory(prefix="lora-jax-push-") as home:
        staged = Path(home) / "staged"
        _write_peft(staged, cell.name, adapted, model)
        missing = copy_record(cell, card, staged)
        text = model_card(staged, cell, repo, license=str(license), base=model.name)
        (staged / CARD).write_text(text, encoding="utf-8")
        files = sizes(staged)
        notes = (*_notes_of_base(model.name), *_notes_of_paths(card), *_notes_of_pack(missing))
        url = None
        if not dry_run:
            url = _send(staged, files, repo, private, revision, force)
    return Pushed(repo, files, text, notes, url)


def _check_licence(license: str | None) -> None:
    if not license:
        raise RequestError(
            "the licence is missing; say under which one the adapter may be used, such as "
            f"--license=apache-2.0 (the base's may bind you; all short names: {LICENCES})"
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise RequestError(
            f"--license={license} is no short name of a licence; see {LICENCES} (`other` if it is "
            "none of them)"
        )


def _finished(run: str | os.PathLike) -> Path:
    """The folder of the run. Raises `RequestError` if it has not finished."""
    cell = cell_of(run).resolve()
    if (cell / "failure.json").exists() and not (cell / "card.json").exists():
        raise RequestError(f"{cell} failed, as its failure.json says; there is nothing to push")
    if not (cell / "card.json").exists():
        raise RequestError(
            f"{cell} is not finished: it has no card.json; run its `lora-jax train` or `sweep` "
            "again, which goes on to the end, then push"
        )
    if not (cell / "adapter").is_dir():
        raise RequestError(
            f"{cell} has no adapter/: it is a copy without weights; push the run itself"
        )
    return cell


def _named_as_on_hub(model: Model, card: Card, base_model: str | None) -> Model:
    """The model under the name that strangers find its weights by."""
    name = base_model or str(card.config["model"].get("name"))
    is_here = os.path.exists(os.path.expanduser(name)) or not _is_hub_id(name)
    if is_here and name not in embedded_names():
        raise RequestError(
            f"the base model is {name!r}, which others do not have; name it as the hub does: "
            "--base-model=owner/name"
        )
    return dataclasses.replace(model, name=name)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII) is not None


def _write_peft(folder: Path, name: str, adapted: Adapted, model: Model) -> None:
    try:
        save_adapter(folder, adapted.method, adapted.trainable, model)
    except RequestError as error:
        raise RequestError(
            f"{name} cannot be pushed as an adapter: {error} (`lora-jax merge` writes a model "
            "folder, `hf upload` sends it)"
        ) from error


def _notes_of_base(base: str) -> list[str]:
    if is_on_hub(base):
        return []
    return [
        f"the base has the name {base!r}, which lora_jax alone knows; --base-model=owner/name "
        "tells PEFT and the hub"
    ]


def _notes_of_paths(card: Card) -> list[str]:
    flat = flat_config(card.config)
    keys = [key for key, setting in SETTINGS.items() if setting.kind == "path"]
    found = [f"{key}={flat[key]}" for key in keys if os.path.isabs(str(flat.get(key) or ""))]
    if not found:
        return []
    return [
        f"the record names files of this machine: {', '.join(found)}; to verify it elsewhere, they "
        "must lie in the same place"
    ]


def _notes_of_pack(missing: list[str]) -> list[str]:
    if not missing:
        return []
    return [
        f"cells of its pack are not here ({', '.join(missing)}); it can be verified with --alone"
    ]


def _send(
    staged: Path,
    files: Mapping[str, int],
    repo: str,
    private: bool,
    revision: str | None,
    force: bool,
) -> str:
    """The URL of the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi()
    made = _make_repo(api, repo, private)
    try:
        with talking(f"push to {repo}"):
            if revision is not None:
                api.create_branch(repo, branch=revision, exist_ok=True)
            info = api.model_info(repo, revision=revision)
            there = {one.rfilename for one in info.siblings or ()}
            _check_replaceable(repo, there, force)
            gone = sorted(name for name in there - files.keys() if is_ours(name))
            adds = [CommitOperationAdd(name, str(staged / name)) for name in files]
            # A commit on what was looked at: the hub refuses it where somebody was faster.
            commit = api.create_commit(
                repo, [*adds, *map(CommitOperationDelete, gone)], revision=revision,
                commit_message="Push a run with lora_jax", parent_commit=info.sha,
            )  # fmt: skip
    except RequestError as error:
        if made:
            raise RequestError(f"{error} ({repo} was created, and holds nothing yet)") from error
        raise
    return str(commit.commit_url)


def _make_repo(api: Any, repo: str, private: bool) -> bool:
    """Makes sure of a repository that is as private as it should be; whether it is a new one."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with talking(f"push to {repo}"):
        info = None
        with contextlib.suppress(RepositoryNotFoundError):
            info = api.model_info(repo)
        if info is None:
            api.create_repo(repo, private=private or None)
            return True
    if private and not info.private:
        raise RequestError(
            f"{repo} exists and is public; change that in its settings on the hub, choose another "
            "--repo, or push without --private"
        )
    return False


def _check_replaceable(repo: str, there: set[str], force: bool) -> None:
    """Raises `RequestError` for a repository of something else, unless `force`."""
    is_run = any(name.startswith("cells/") and is_ours(name) for name in there)
    others = sorted(name for name in there if not _HARMLESS.fullmatch(name))
    if others and not is_run and not force:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        raise RequestError(
            f"{repo} holds something else already ({shown}); choose another --repo, or add "
            "--force to push among it"
        )
