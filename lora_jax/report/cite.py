"""BibTeX for a run or a sweep: what a reader needs to find and repeat it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.io.paths import at_home
from lora_jax.methods.registry import title_of
from lora_jax.report.runs import FinishedRun, finished_runs, read_runs
from lora_jax.train.record import Card

LORA_PAPER = r"""@inproceedings{hu2022lora,
  title     = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author    = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li,
               Yuanzhi and Wang, Shean and Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year      = {2022},
  eprint    = {2106.09685},
}"""


def cite(folder: str | Path) -> str:
    """BibTeX of a finished cell (WORKDIR/cells/NAME), or of all finished cells of a workdir.

    The key and the note carry the hash: the cell's config hash, or that of all of them together.
    Raises `RequestError` where nothing has finished.
    """
    folder = at_home(folder).resolve()
    one = (folder / "card.json").exists()
    runs = finished_runs(read_runs(folder.parent.parent if one else folder))
    runs = [run for run in runs if not one or run.folder.name == folder.name]
    if not runs:
        raise RequestError(f"no run in {folder} has finished; there is nothing to cite yet")
    return f"{_entry(runs, folder)}\n\n{LORA_PAPER}\n"


def _entry(runs: Sequence[FinishedRun], folder: Path) -> str:
    cards = [run.card for run in runs]
    whole = combined_hash(cards)
    versions = sorted({card.versions.get("lora_jax", "unknown") for card in cards})
    commits = sorted({card.commit for card in cards})
    models = sorted({str(card.config["model"].get("name")) for card in cards})
    years = sorted({(card.finished or "")[:4] for card in cards} - {""})
    seed, result = [], []
    title = f"lora_jax sweep {folder.name}: {len(runs)} runs"
    if len(runs) == 1:
        title = f"lora_jax run {runs[0].name}: {_what(cards[0].config)}"
        test = cards[0].metrics.test
        seed = [f"seed {cards[0].config.get('seed')}"]
        result = [f"test loss {test.loss:.6g}, accuracy {test.accuracy:.6g}"]
    note = [
        f"config{'s' if len(runs) > 1 else ''} sha256 {whole}",
        *(f"base sha256 {h}" for h in sorted({card.base_hash for card in cards})),
        *(f"data sha256 {h}" for h in sorted({card.data_hash for card in cards})),
        f"model {', '.join(models)}",
        *seed,
        f"commit {', '.join(commits)}",
        *result,
    ]
    fields = {
        "title": "{" + _escape(title) + "}",
        "howpublished": _escape(f"lora_jax {', '.join(versions)}"),
        "note": _escape("; ".join(note)),
        **({"year": years[-1]} if years else {}),
    }
    width = max(map(len, fields))
    body = "\n".join(f"  {name.ljust(width)} = {{{value}}}," for name, value in fields.items())
    return f"@misc{{lora_jax:{whole[:12]},\n{body}\n}}"


def combined_hash(cards: Sequence[Card]) -> str:
    """The config hash of one card; of several, sha256 (hex) over theirs, in sorted order."""
    hashes = sorted(card.config_hash for card in cards)
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _what(config: Mapping[str, Any]) -> str:
    method = config["method"]
    title = title_of(method["name"])
    if method["name"] != "lora":
        return title
    return f"{title}, rank {method.get('rank')}, targets {method.get('targets')}"


def _escape(text: str) -> str:
    return re.sub(r"([&%$#_{}])", r"\\\1", text)
