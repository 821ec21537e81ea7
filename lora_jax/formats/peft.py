"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, in and out.

Names and layouts are PEFT 0.21's. ΔW = s · B A with A (r, in) and B (out, r), where s is alpha / r,
or alpha / √r with `use_rslora`; this project's `a` and `b` are their transposes.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.core.rules import Rule
from lora_jax.core.trees import nearest
from lora_jax.formats.peft_assemble import Part, assemble, pattern_of_paths
from lora_jax.formats.peft_config import CONFIG, PeftConfig
from lora_jax.formats.peft_keys import TENSORS, Keys, read_keys
from lora_jax.formats.peft_names import EMBEDDING, Module, Names, View
from lora_jax.formats.peft_save import check_base, save_adapter
from lora_jax.formats.peft_split import has_pooled_head
from lora_jax.formats.safetensors import read_tensors
from lora_jax.methods import Combined, DoRA, LoRA, Method, RsLoRA
from lora_jax.methods.lookup import LookupLoRA
from lora_jax.models.checkpoint import HEAD_ENTRIES, HEAD_FILE
from lora_jax.models.functional import flatten
from lora_jax.models.hf_names import params_from_tensors
from lora_jax.models.model import Model
from lora_jax.models.sources import find_adapter

__all__ = ["load_adapter", "save_adapter"]

Trainable = dict[str, dict[str, Any]]


def load_adapter(
    path: str | os.PathLike, model: Model, *, adapter_name: str | None = None
) -> tuple[Method, Trainable]:
    """Reads an adapter that PEFT, or `save_adapter`, wrote: `(method, trainable)` for `model`.

    `path` is a folder or a hub id; `adapter_name` the subfolder of one of several. `trainable` is
    float32 or wider, so that it can be trained further; modules saved whole have the parameter's
    own dtype. Every tensor must belong to a module that the config targets, and every targeted
    module must have its tensors; what is not there, or not implemented, raises `RequestError`.

    On a tied model an adapter of the embedding acts on lookups alone, as in PEFT (`LookupLoRA`).
    With `scan_layers` the layers' factors are stacked; layers without an adapter have zeros.
    """
    folder = find_adapter(path, adapter_name)
    config = PeftConfig.read(folder / CONFIG)
    keys = read_keys(folder)
    check_base(folder / TENSORS, model)
    names = Names.of(model)
    view = names.view_of(keys.parts)
    _check_tying(config, keys, names, view)
    modules = _adapted_modules(config, keys, names, view, folder)
    _check_bases(keys, names, view, model, folder)
    parts = [
        _part_of(config, keys.parts[view.there(module.name)], module, view, folder)
        for module in modules
    ]
    whole = _whole(config, keys, names, view, model, folder)
    whole |= _pooled_head(model, folder)
    return _method_of(config, parts, whole, model)


def _check_tying(config: PeftConfig, keys: Keys, names: Names, view: View) -> None:
    tables = {name for name, module in names.modules.items() if module.kind == EMBEDDING}
    tables |= {"lm_head"}
    touched = {view.here(name) for name in keys.parts}
    touched |= {view.here(name).rpartition(".")[0] for name in keys.whole}
    if config.ensure_weight_tying and touched & tables:
        raise RequestError(
            f"{config.place}: ensure_weight_tying is True, which trains a tied table and its head "
            "together and is not implemented; merge the adapter with peft and load the merged model"
        )


def _adapted_modules(
    config: PeftConfig, keys: Keys, names: Names, view: View, folder: Path
) -> list[Module]:
    """The modules with an adapter, those of the config and those of the file being the same."""
    wanted = {
        name
        for name, module in names.modules.items()
        if config.targets(
            view.there(name),
            is_linear=module.kind != EMBEDDING,
            is_output=module.is_output,
        )
    }
    found = {view.here(name) for name in keys.parts}
    unknown = sorted(found - names.modules.keys())
    if unknown:
        near = nearest(view.here(unknown[0]), names.modules)
        raise RequestError(
            f"{folder / TENSORS} holds an adapter of {unknown[0]!r}, which this model does not "
            f"have; {near}; load the model that the adapter was made for, with its head if it has "
            "one"
        )
    if extra := sorted(found - wanted):
        raise RequestError(
            f"{folder / TENSORS} holds an adapter of {extra[0]!r}"
            f"{_and_more(extra)}, which the target_modules of {CONFIG} do not name; they belong to "
            "different adapters"
        )
    if missing := sorted(wanted - found):
        raise RequestError(
            f"{folder / TENSORS} lacks the adapter of {missing[0]!r}{_and_more(missing)}, which "
            f"{CONFIG} targets; copy the adapter again, or load the model it was made for"
        )
    if not wanted:
        raise RequestError(
            f"{config.place}: target_modules {config.target_modules!r} match no module of this "
            f"model; {nearest(str(config.target_modules), names.modules)}"
        )
    # In the model's own order.
    return [module for name, module in names.modules.items() if name in wanted]


def _and_more(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _part_of(
    config: PeftConfig, arrays: Mapping[str, np.ndarray], module: Module, view: View, folder: Path
) -> Part:
    """One module's adapter in this project's orientation, its shapes checked against the config."""
    there = view.there(module.name)
    wanted = {"A", "B", "magnitude"} if config.use_dora else {"A", "B"}
    if arrays.keys() != wanted:
        odd = sorted(arrays.keys() ^ wanted)[0]
        side = "lacks" if odd in wanted else "holds"
        raise RequestError(
            f"{folder / TENSORS} {side} the {odd} of {there!r}, with use_dora={config.use_dora} in "
            f"{CONFIG}; copy the adapter again"
        )
    rank, alpha = config.rank_of(there), config.alpha_of(there)
    if module.is_tied and (module.name == "lm_head" or config.use_dora):
        raise RequestError(
            f"{folder} adapts {there!r} apart from the table that this model ties it to"
            f"{' by DoRA' if config.use_dora else ''}; load the model with "
            "load_model(…, untie=True), which gives the head a kernel of its own"
        )
    for name, array in arrays.items():
        ndim = 1 if name == "magnitude" else 2
        place = 1 if name == "B" else 0
        if array.ndim != ndim or (ndim == 2 and array.shape[place] != rank):
            raise RequestError(
                f"{folder / TENSORS}: {name} of {there!r} is {array.shape}, but {CONFIG} says rank "
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
        place=f"{folder / TENSORS}: {there!r}",
    )


def _check_bases(keys: Keys, names: Names, view: View, model: Model, folder: Path) -> None:
    """The frozen weights that lie beside an embedding's adapter must be this model's."""
    flat = flatten(model.params)
    for there, array in keys.bases.items():
        module = names.modules.get(view.here(there))
        if module is None:
            raise RequestError(
                f"{folder / TENSORS} holds the weight of {there!r}, which this model does not have"
            )
        own = np.asarray(flat[module.entry.path])
        if own.shape != (array.T if module.entry.is_transposed else array).shape:
            raise RequestError(
                f"{folder / TENSORS} was made for an embedding {array.shape}, this model has "
                f"{own.shape}; load the base whose vocabulary was resized in the same way"
            )
        own = own.T if module.entry.is_transposed else own
        coarse = min(own.dtype, array.dtype, key=lambda dtype: dtype.itemsize)
        if not np.array_equal(own.astype(coarse), array.astype(coarse)):
            raise RequestError(
                f"{folder / TENSORS} was made for other weights of {there!r} than this model has; "
                "load the model that the adapter was made for"
            )


def _whole(
    config: PeftConfig, keys: Keys, names: Names, view: View, model: Model, folder: Path
) -> dict[str, Any]:
    """`{path: array}` of the parameters that the file holds whole: heads, norms, biases."""
    flat = flatten(model.params)
    adapted = {view.here(name) for name in keys.parts}
    stacked: dict[str, set[int]] = defaultdict(set)
    values: dict[str, Any] = {}
    given = {view.here(name): array for name, array in keys.whole.items()}
    for name, entry in names.tensors.items():
        module = name.rpartition(".")[0]
        is_bias = name.endswith(".bias")
        is_saved = config.saves(view.there(module))
        is_bias_saved = is_bias and (
            config.bias == "all" or (config.bias == "lora_only" and module in adapted)
        )
        if not (is_saved or is_bias_saved):
            continue
        if name not in given:
            raise RequestError(
                f"{folder / TENSORS} lacks {view.there(name)!r}, which {CONFIG} says was trained "
                f"(modules_to_save={list(config.modules_to_save)}, bias={config.bias!r})"
            )
        if is_saved and module in names.modules and names.modules[module].is_tied:
            raise RequestError(
                f"{folder} trains {module!r} whole, apart from the table that this model ties it "
                "to; load the model with load_model(…, untie=True)"
            )
        array = given.pop(name)
        array = array.T if entry.is_transposed else array
        old = flat[entry.path]
        shape = tuple(old.shape) if entry.index is None else tuple(old.shape[1:])
        if array.shape != shape:
            raise RequestError(
                f"{folder / TENSORS}: {view.there(name)!r} is {array.shape}, this model has "
                f"{shape}; load the model that the adapter was made for"
            )
        if entry.index is None:
            values[entry.path] = jnp.array(array, dtype=old.dtype)
            continue
        if entry.path not in values:
            values[entry.path] = np.array(old)
        values[entry.path][entry.index] = array
        stacked[entry.path].add(entry.index)
    if given:
        extra = sorted(given)
        raise RequestError(
            f"{folder / TENSORS} holds {view.there(extra[0])!r}{_and_more(extra)}, which is no "
            f"parameter of this model that {CONFIG} says was trained (modules_to_save="
            f"{list(config.modules_to_save)}, bias={config.bias!r}); load the model it was made "
            "for, with its head"
        )
    return {path: jnp.asarray(value) for path, value in values.items()}


def _pooled_head(model: Model, folder: Path) -> dict[str, Any]:
    """The head that `save_adapter` put beside, of a model whose head stands on a pooling."""
    path, flat = folder / HEAD_FILE, flatten(model.params)
    if not path.is_file():
        return {}
    if not has_pooled_head(model):
        raise RequestError(
            f"{folder} holds {HEAD_FILE}, a head for pooled hidden states, but this model has "
            "none; load it with head='classification'"
        )
    return params_from_tensors(
        read_tensors(path),
        HEAD_ENTRIES,
        flat,
        ignored=(),
        place=str(path),
        convert=lambda p, array: jnp.array(array, dtype=flat[p].dtype),
    )


def _method_of(
    config: PeftConfig, parts: Sequence[Part], whole: Mapping[str, Any], model: Model
) -> tuple[Method, Trainable]:
    stacked = bool(getattr(model.config, "scan_layers", False))
    kind = DoRA if config.use_dora else RsLoRA if config.use_rslora else LoRA
    flat = flatten(model.params)
    groups: dict[tuple[int, float, bool], list[str]] = defaultdict(list)
    trainable: Trainable = {}
    for site in assemble(parts, flat, kind=kind):
        groups[site.rank, site.alpha, site.is_tied].append(site.path)
        trainable[site.path] = {name: jnp.asarray(x) for name, x in site.arrays.items()}

    def rules(tied: bool) -> list[Rule]:
        return [
            Rule(pattern_of_paths(paths, flat), rank=rank, alpha=alpha, dropout=config.lora_dropout)
            for (rank, alpha, is_tied), paths in groups.items()
            if is_tied == tied
        ]

    shared = {"axes": model.axes if stacked else None, "aliases": model.aliases}
    train = tuple(re.escape(path) for path in whole)
    trainable |= {path: {"value": value} for path, value in whole.items()}
    methods: list[Method] = []
    if plain := rules(tied=False):
        methods.append(kind(rules=plain, train=train, **shared))
    if tied := rules(tied=True):
        # rsLoRA's scale, as an alpha.
        if config.use_rslora:
            tied = [_with_alpha(rule, rule.alpha * rule.rank**0.5) for rule in tied]
        own = {} if plain else {"train": train}
        methods.append(LookupLoRA(rules=tied, **own, **shared))
    return (methods[0] if len(methods) == 1 else Combined(methods)), trainable


def _with_alpha(rule: Rule, alpha: float) -> Rule:
    return Rule(rule.targets, rank=rule.rank, alpha=alpha, dropout=rule.dropout)
