"""The settings that experiments share, and how a config reads its argument."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ml_collections import ConfigDict

from lora_jax import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.settings import make_config

Changes = Mapping[str, Any]

# Rank 8 on query and value. All is spelled out, as it is in the hashes of committed cards.
LORA = {
    "method.name": "lora",
    "method.targets": "q,v",
    "method.rank": 8,
    "method.alpha": 16.0,
    "method.dropout": 0.0,
    "method.init": "kaiming_uniform",
}
# MiniLM, a warm-up over 6% of the steps.
MINILM = {
    "model.name": "minilm",
    "data.text": "text",
    "data.label": "label",
    "optimizer.warmup_ratio": 0.06,
}
# Movie reviews of at most 32 tokens, two classes.
REVIEWS = {
    **MINILM,
    **LORA,
    "model.num_labels": 2,
    "data.source": "reviews",
    "data.max_length": 32,
    "data.buckets": (16, 24, 32),
}
# Glosses of WordNet's nouns and their 26 domains: one epoch, 200 steps.
WORDNET = {
    **MINILM,
    "model.num_labels": 26,
    "data.source": "wordnet",
    "data.max_length": 16,
    "data.buckets": (16,),
    "data.limit": 6400,
    "data.eval_limit": 1500,
    "optimizer.lr": 2e-3,
    "train.num_epochs": 1.0,
    "train.eval_every_steps": 200,
}
# A tiny model on 64 reviews, in the place of WORDNET.
SMOKE = {
    "model.name": "tiny-bert",
    "model.num_labels": 2,
    "data.source": "reviews",
    "data.limit": 64,
    "data.eval_limit": 64,
    "train.num_steps": 4,
    "train.eval_every_steps": 4,
}
# Completions of E2E's meanings, alpha 32 at rank 4 as in the paper.
E2E = {
    **LORA,
    "model.head": "causal-lm",
    "model.scan_layers": True,  # one layer is compiled, not each: seconds for minutes
    "data.source": "e2e",
    "data.path": "../shared/data/e2e",
    "data.text": "prompt",
    "data.label": "completion",
    "method.rank": 4,
    "method.alpha": 32.0,
}
# Pairs made in code, in the place of E2E; the model is the config's to name.
TINY_PAIRS = {
    "data.source": "tiny-pairs",
    "data.path": "",
    "data.max_length": 96,
    "data.buckets": (96,),
    "train.num_steps": 4,
}


def config_of(file: str, arg: str, sizes: Mapping[str, Changes], *changes: Changes) -> ConfigDict:
    """The config of these changes at the size that `arg` names. Raises `RequestError`."""
    if arg not in sizes:
        raise RequestError(f"{file}.py:{arg}: no size {arg!r}; {nearest(arg, sizes)}")
    return make_config(*changes, sizes[arg])


def read_argument(
    file: str, arg: str, what: str, names: Collection[str], sizes: Collection[str]
) -> tuple[str, str]:
    """`(name, size)` of an argument "NAME,SIZE" or "NAME". Raises `RequestError`."""
    name, _, size = arg.partition(",")
    if name not in names:
        meant = f"; did you mean '{next(iter(names))},{name}'?" if name in sizes else ""
        raise RequestError(f"{file}.py:{arg}: no {what} {name!r}; {nearest(name, names)}{meant}")
    if size not in sizes:
        raise RequestError(f"{file}.py:{arg}: no size {size!r}; {nearest(size, sizes)}")
    return name, size
