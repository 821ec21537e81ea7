"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, in and out.

Names and layouts are PEFT 0.21's. ΔW = s · B A with A (r, in) and B (out, r), where s is alpha / r,
or alpha / √r with `use_rslora`; this project's `a` and `b` are their transposes.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.core.rules import Rule
from lora_jax.methods import Combined, DoRA, LoRA, Method, RsLoRA
from lora_jax.methods.lookup import LookupLoRA
from lora_jax.models.model import Model
from lora_jax.models.sources import find_adapter
from lora_jax.peft.assemble import Part, assemble, pattern_of_paths
from lora_jax.peft.config import CONFIG, PeftConfig
from lora_jax.peft.keys import TENSORS, read_keys
from lora_jax.peft.names import EMBEDDING, UNTIE, Module, Names
from lora_jax.peft.save import check_base, save_adapter
from lora_jax.peft.whole import (
    Reading,
    and_more,
    check_bases,
    pooled_head,
    whole_values,
    with_stored_tables,
)

__all__ = ["load_adapter", "save_adapter"]

Trainable = dict[str, dict[str, Any]]
# Of heads that say one thing of a text; an encoder's or a language model's adapter has none.
_TASKS = ("SEQ_CLS", "FEATURE_EXTRACTION", "CAUSAL_LM")


def load_adapter(
    path: str | os.PathLike, model: Model, *, adapter_name: str | None = None
) -> tuple[Method, Trainable]:
    """Reads an adapter that PEFT, or `save_adapter`, wrote: `(method, trainable)` for `model`.

    Args:
      path: a folder or a hub id.
      model: the base that the adapter was made for.
      adapter_name: the subfolder of one of several.

    Returns:
      `trainable` is float32 or wider, so that it can be trained further; modules saved whole have
      the parameter's own dtype.

    Raises:
      RequestError: something is missing or not implemented; a tensor belongs to no module that the
        config targets, or a targeted module lacks its tensors.

    On a tied model an adapter of the embedding acts on lookups alone, as in PEFT (`LookupLoRA`).
    With `scan_layers` the layers' factors are stacked; layers without an adapter have zeros.
    """
    folder = find_adapter(path, adapter_name)
    config = PeftConfig.read(folder / CONFIG)
    keys = read_keys(folder)
    check_base(folder / TENSORS, model)
    names = Names.of(model)
    view = names.view_of(keys.parts)
    keys = keys.without({view.there(name) for name in names.phantoms})
    reading = Reading(folder, model, config, keys, names, view)
    _check_tying(reading)
    if model.head is not None and config.task_type not in (None, *_TASKS):
        raise RequestError(
            f"{config.place}: task_type is {config.task_type!r}, whose head is another than this "
            "model's; load the model with head=None, and an adapter without a head"
        )
    # PEFT passes over keys that match no targeted module without a word.
    targeted = names.targeted(config, view)
    config.warn_of_idle_keys([view.there(name) for name in targeted])
    _check_modules(reading, set(targeted))
    reading = with_stored_tables(reading)
    check_bases(reading)
    parts = [_part_of(reading, names.modules[name]) for name in targeted]
    return _method_of(reading, parts, whole_values(reading) | pooled_head(reading))


def _check_tying(reading: Reading) -> None:
    view = reading.view
    tables = {name for name, one in reading.names.modules.items() if one.kind == EMBEDDING}
    tables |= {"lm_head"}
    touched = {view.here(name) for name in reading.keys.parts}
    touched |= {view.here(name).rpartition(".")[0] for name in reading.keys.whole}
    if reading.config.ensure_weight_tying and touched & tables:
        raise RequestError(
            f"{reading.config.place}: ensure_weight_tying is True, which trains a tied table and "
            "its head together and is not implemented; merge the adapter with peft and load the "
            "merged model"
        )


def _check_modules(reading: Reading, wanted: set[str]) -> None:
    """The modules that the config targets and those of the file must be the same."""
    modules, view = reading.names.modules, reading.view
    found = {view.here(name) for name in reading.keys.parts}
    unknown = sorted(found - modules.keys())
    if unknown:
        near = nearest(view.here(unknown[0]), modules)
        raise RequestError(
            f"{reading.file} holds an adapter of {unknown[0]!r}, which this model does not "
            f"have; {near}; load the model that the adapter was made for, with its head if it has "
            "one"
        )
    if extra := sorted(found - wanted):
        raise RequestError(
            f"{reading.file} holds an adapter of {extra[0]!r}"
            f"{and_more(extra)}, which the target_modules of {CONFIG} do not name; they belong to "
            "different adapters"
        )
    if missing := sorted(wanted - found):
        raise RequestError(
            f"{reading.file} lacks the adapter of {missing[0]!r}{and_more(missing)}, which "
            f"{CONFIG} targets; copy the adapter again, or load the model it was made for"
        )
    if not wanted:
        targets = reading.config.target_modules
        raise RequestError(
            f"{reading.config.place}: target_modules {targets!r} match no module of this "
            f"model; {nearest(str(targets), modules)}"
        )


def _part_of(reading: Reading, module: Module) -> Part:
    """One module's adapter in this project's orientation, its shapes checked against the config."""
    config, file, there = reading.config, reading.file, reading.view.there(module.name)
    arrays = reading.keys.parts[there]
    wanted = {"A", "B", "magnitude"} if config.use_dora else {"A", "B"}
    if arrays.keys() != wanted:
        odd = sorted(arrays.keys() ^ wanted)[0]
        side = "lacks" if odd in wanted else "holds"
        raise RequestError(
            f"{file} {side} the {odd} of {there!r}, with use_dora={config.use_dora} in "
            f"{CONFIG}; copy the adapter again"
        )
    rank, alpha = config.rank_of(there), config.alpha_of(there)
    if module.is_tied and (module.name == "lm_head" or config.use_dora):
        raise RequestError(
            f"{reading.folder} adapts {there!r} apart from the table that this model ties it to"
            f"{' by DoRA' if config.use_dora else ''}; {UNTIE}"
        )
    for name, array in arrays.items():
        ndim = 1 if name == "magnitude" else 2
        place = 1 if name == "B" else 0
        if array.ndim != ndim or (ndim == 2 and array.shape[place] != rank):
            raise RequestError(
                f"{file}: {name} of {there!r} is {array.shape}, but {CONFIG} says rank "
                f"{rank} there; they belong to different adapters"
            )
    if config.use_rslora and config.use_dora:
        # DoRA's scale is alpha / r here: the other one, as an alpha.
        alpha *= rank**0.5
    return Part(
        module=module,
        rank=rank,
        alpha=alpha,
        a=np.ascontiguousarray(arrays["A"].T),
        b=np.ascontiguousarray(arrays["B"].T),
        magnitude=arrays.get("magnitude"),
        place=f"{file}: {there!r}",
    )


def _method_of(
    reading: Reading, parts: Sequence[Part], whole: Mapping[str, Any]
) -> tuple[Method, Trainable]:
    config, model, flat = reading.config, reading.model, reading.flat
    stacked = bool(getattr(model.config, "scan_layers", False))
    kind = DoRA if config.use_dora else RsLoRA if config.use_rslora else LoRA
    groups: dict[tuple[int, float, bool], list[str]] = defaultdict(list)
    trainable: Trainable = {}
    for site in assemble(parts, flat, kind=kind):
        groups[site.rank, site.alpha, site.is_tied].append(site.path)
        trainable[site.path] = {name: jnp.asarray(x) for name, x in site.arrays.items()}

    def rules(tied: bool) -> list[Rule]:
        return [
            Rule(
                pattern_of_paths(paths, flat),
                rank=rank,
                alpha=alpha,
                dropout=config.lora_dropout,
                any_rank=True,
            )
            for (rank, alpha, is_tied), paths in groups.items()
            if is_tied == tied
        ]

    shared = {"axes": model.axes if stacked else None, "aliases": model.aliases}
    if both := sorted(trainable.keys() & whole.keys()):
        raise RequestError(
            f"{config.place}: {both[0]!r} is adapted in some layers and trained whole in others, "
            "which one stacked parameter cannot be; load the model without scan_layers"
        )
    train = tuple(re.escape(path) for path in whole)
    trainable |= {path: {"value": value} for path, value in whole.items()}
    methods: list[Method] = []
    if plain := rules(tied=False):
        methods.append(kind(rules=plain, train=train, **shared))
    if tied := rules(tied=True):
        # rsLoRA's scale, as an alpha.
        if config.use_rslora:
            tied = [dataclasses.replace(r, alpha=r.alpha * r.rank**0.5) for r in tied]
        own = {} if plain else {"train": train}
        methods.append(LookupLoRA(rules=tied, **own, **shared))
    return (methods[0] if len(methods) == 1 else Combined(methods)), trainable
