"""From this project's adapters, one a parameter or a slice of one, to PEFT's, one a module."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.methods import DoRA, LoRA, Method, RsLoRA
from lora_jax.methods.lookup import LookupLoRA
from lora_jax.methods.sites import Site, path_of
from lora_jax.models.checkpoint import HEAD_ENTRIES
from lora_jax.models.families import CAUSAL_LM
from lora_jax.models.functional import flatten
from lora_jax.models.model import Model
from lora_jax.models.pooling import FAMILY
from lora_jax.peft.assemble import cast
from lora_jax.peft.config import holders
from lora_jax.peft.names import Module, Names

POOLED_HEAD = {entry.path for entry in HEAD_ENTRIES}


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One module's adapter: a (in, r), b (r, out) and perhaps a magnitude (out,), NumPy.

    `scale` is what stands before a @ b; `alpha` says the same in the terms of the whole file.
    """

    module: Module
    a: np.ndarray
    b: np.ndarray
    scale: float
    alpha: float
    magnitude: np.ndarray | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[1]


@dataclasses.dataclass(frozen=True)
class Written:
    """What a PEFT folder will say. `biases` and `saved` are names of tensors.

    `has_pooled_head`: a head on sentence-transformers' pooling, which no class of transformers has;
    it goes into a file of its own.
    """

    adapters: Mapping[str, Adapter]
    use_rslora: bool
    use_dora: bool
    bias: str
    biases: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    saved: tuple[str, ...]
    dropout: float
    has_pooled_head: bool = False

    def plain(self) -> Written:
        """With alpha = r for all modules alike: scales in b, ranks padded with zeros."""
        if self.use_dora:
            raise RequestError(
                "a DoRA has no plain form: it is no sum of the base and a low-rank change; merge it"
            )
        rank = max((one.rank for one in self.adapters.values()), default=0)
        adapters = {}
        for name, one in self.adapters.items():
            more = rank - one.rank
            a = np.pad(one.a, ((0, 0), (0, more)))
            b = cast(one.b, one.b.dtype, f"the plain B of {name!r}", one.scale)
            b = np.pad(b, ((0, more), (0, 0)))
            adapters[name] = dataclasses.replace(one, a=a, b=b, scale=1.0, alpha=float(rank))
        return dataclasses.replace(self, adapters=adapters, use_rslora=False)


def split(
    method: Method, trainable: Mapping[str, Mapping[str, Any]], model: Model, names: Names
) -> Written:
    """Raises `RequestError` for a method, or a place of it, that PEFT has no words for."""
    flat = flatten(model.params)
    by_path: dict[str, list[Module]] = defaultdict(list)
    for module in names.modules.values():
        if not (module.is_tied and module.name == "lm_head"):
            by_path[module.entry.path].append(module)
    sites: dict[str, list[tuple[LoRA, Site, Mapping[str, Any]]]] = defaultdict(list)
    whole: set[str] = set()
    for name, entry in trainable.items():
        if "value" in entry:
            whole.add(name)
            continue
        if "rows" in entry:
            raise RequestError(
                f"{name!r} are single trained rows, which this version does not write for PEFT; "
                "merge them and save the model, or train the table whole"
            )
        path, owner = path_of(name), _lora_of(name, method)
        if path not in by_path:
            raise RequestError(
                f"{name!r} is no weight of a module that PEFT can adapt in {model.name}; merge it"
            )
        tied = by_path[path][0].is_tied
        if tied and not isinstance(owner, LookupLoRA):
            raise RequestError(
                f"{name!r} is tied to the head here, so its adapter changes both, while PEFT's "
                "changes lookups alone; train it on load_model(…, untie=True), or merge it"
            )
        site = owner.site_of(name, flat[path].shape)
        sites[path].append((owner, site, entry))
    use_dora = _all_or_none(sites, DoRA)
    use_rslora = not use_dora and _all_or_none(sites, RsLoRA, strict=False)
    adapters: dict[str, Adapter] = {}
    for path, found in sites.items():
        for module in by_path[path]:
            one = _adapter(module, found, flat[path], use_rslora)
            if one is not None:
                adapters[module.name] = one
    if not adapters:
        raise RequestError(
            "this method has no low-rank adapter, and a PEFT folder must have one; merge it "
            "and save the model (lora-jax merge)"
        )
    in_order = {name: adapters[name] for name in names.modules if name in adapters}
    dropouts = {site.rule.dropout for found in sites.values() for _, site, _ in found}
    pooled = has_pooled_head(model)
    whole -= POOLED_HEAD if pooled else set()
    bias, biases, to_save, saved = _whole_parts(whole, in_order, names, model)
    return Written(
        in_order,
        use_rslora,
        use_dora,
        bias,
        biases,
        to_save,
        saved,
        max(dropouts, default=0.0),
        pooled,
    )


def _lora_of(name: str, method: Method) -> LoRA:
    """The method of this adapter.

    Raises `RequestError` if what it binds is not what PEFT computes from A, B and m.
    """
    owner = method.owner_of(name)
    owner.check_merges()
    kind = next((kind for kind in (DoRA, LookupLoRA) if isinstance(owner, kind)), LoRA)
    same = ("weight", "_bind_adapter", "_bind_over")
    is_lora = isinstance(owner, LoRA)
    if not is_lora or any(getattr(type(owner), n) is not getattr(kind, n) for n in same):
        raise RequestError(
            f"{type(owner).__name__} at {name!r} has no form in PEFT; merge it and save the model "
            "(lora-jax merge)"
        )
    return owner


def has_pooled_head(model: Model) -> bool:
    """Whether the model's head stands on a pooling that transformers' classes do not have."""
    return model.head is not None and model.kind != CAUSAL_LM and model.pooling != FAMILY


def _all_or_none(sites, kind: type, *, strict: bool = True) -> bool:
    """Whether all adapters are of this kind; the flag is the whole file's."""
    are = [isinstance(owner, kind) for found in sites.values() for owner, _, _ in found]
    if any(are) and not all(are) and strict:
        raise RequestError(
            f"some of these adapters are {kind.__name__} and some are not, and a PEFT file is one "
            "or the other; save them as two adapters, or merge"
        )
    return bool(are) and all(are)


def _adapter(module: Module, found, kernel: Any, use_rslora: bool) -> Adapter | None:
    """The adapter of one module; None for a layer of a stack whose own factors are all zero."""
    index = module.entry.index
    cut = (lambda x: np.asarray(x)) if index is None else (lambda x: np.asarray(x)[index])
    pieces = []
    for owner, site, entry in found:
        if isinstance(owner, DoRA) and site.rule.slice:
            raise RequestError(
                f"{site.name!r} is DoRA on a slice, and PEFT's norm is over whole weights; merge it"
            )
        a, b = owner.factors(entry, site)
        if not a.shape[-1]:
            raise RequestError(
                f"{type(owner).__name__} has factors of rank 0 at {site.name!r}, and a "
                "PEFT adapter has a rank of at least 1; leave that parameter out, or merge it"
            )
        a, b = cut(site.widen(a, "sir")), cut(site.widen(b, "sro"))
        pieces.append((a, b, float(owner.scale(site.rule)), float(site.rule.alpha)))
    has_magnitude = any("magnitude" in entry for _, _, entry in found)
    # An adapter that has not been trained yet has a b of zeros, too, but not an a.
    is_empty = not has_magnitude and not any(a.any() or b.any() for a, b, _, _ in pieces)
    if index is not None and is_empty:
        return None
    owner, site, entry = found[0]
    magnitude = cut(entry["magnitude"]) if "magnitude" in entry else None
    scales = {scale for _, _, scale, _ in pieces}
    if len(pieces) == 1:
        a, b, scale, alpha = pieces[0]
    else:
        # Slices of one kernel side by side: one scale, or theirs moved into b.
        scale = scales.pop() if len(scales) == 1 else 1.0
        a = np.concatenate([a for a, _, _, _ in pieces], axis=1)
        b = np.concatenate([b * b.dtype.type(own / scale) for _, b, own, _ in pieces], axis=0)
        alpha = None
    rank = a.shape[1]
    power = 0.5 if use_rslora else 1.0
    # The rule's own alpha where it says the scale, free of rounding.
    if alpha is None or alpha / rank**power != scale:
        alpha = scale * rank**power
    return Adapter(module, a, b, scale, alpha, magnitude)


def _whole_parts(whole: set[str], adapters: Mapping[str, Adapter], names: Names, model: Model):
    """`(bias, its tensors, modules_to_save, their tensors)` of the parameters trained whole."""
    tensors = {name for name, entry in names.tensors.items() if entry.path in whole}
    known = {entry.path for entry in names.tensors.values()}
    if odd := sorted(whole - known):
        raise RequestError(
            f"{odd[0]!r} is trained whole, but it is no parameter of transformers' class of this "
            "model (a head on another pooling?); evaluate or merge the run instead"
        )
    every = {name for name in names.tensors if name.endswith(".bias")}
    of_adapted = {f"{name}.bias" for name in adapters} & every
    trained = tensors & every
    bias = "none"
    own: set[str] = set()
    if trained and every <= trained:
        bias, own = "all", every
    elif of_adapted and of_adapted <= trained:
        bias, own = "lora_only", of_adapted
    rest = {name.rpartition(".")[0] for name in tensors - own}
    head_adapted = any(one.module.is_output for one in adapters.values())
    if model.head is not None and not has_pooled_head(model) and not head_adapted:
        # PEFT makes its own copy of a classifier, trained or not.
        rest |= {
            n.rpartition(".")[0] for n, e in names.tensors.items() if e.path.startswith("head/")
        }
    if both := sorted(rest & adapters.keys()):
        raise RequestError(
            f"{both[0]!r} has an adapter and parameters trained whole, which PEFT cannot say "
            "unless all biases of adapted modules are trained; train one of them, or merge"
        )
    to_save = _collapsed(rest, names, model)
    saved = [n for n in names.tensors if n.rpartition(".")[0] in rest]
    return bias, tuple(sorted(own - set(saved))), to_save, tuple(saved)


def _collapsed(modules: set[str], names: Names, model: Model) -> tuple[str, ...]:
    """Names for `modules_to_save`: a head's own where all of it is there."""
    roots = set(model.family.head_modules)
    found = {
        module.partition(".")[0] if module.partition(".")[0] in roots else module
        for module in modules
    }
    every = {name.rpartition(".")[0] for name in names.tensors}
    for name in found:
        meant = {m for m in every if any(holder.endswith(name) for holder in holders(m))}
        if not meant <= modules:
            raise RequestError(
                f"PEFT's modules_to_save takes every module whose name ends in {name!r}, "
                f"{sorted(meant - modules)[0]!r} among them, which is not trained whole; train "
                "those too, or merge"
            )
    return tuple(sorted(found))
