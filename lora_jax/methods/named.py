"""Methods by name, from plain settings: what a config or a cell of a sweep says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.core.rules import Rule
from lora_jax.core.trees import nearest
from lora_jax.methods.base import Method
from lora_jax.methods.dora import DoRA
from lora_jax.methods.full import BitFit, FullFineTuning, HeadOnly
from lora_jax.methods.intrinsic import IntrinsicDimension
from lora_jax.methods.lora import LoRA
from lora_jax.methods.lora_fa import LoRAFA
from lora_jax.methods.lora_plus import LoRAPlus
from lora_jax.methods.lora_xs import LoRAXS
from lora_jax.methods.pissa import PiSSA
from lora_jax.methods.rslora import RsLoRA
from lora_jax.methods.uni_lora import UniLoRA
from lora_jax.methods.vera import VeRA
from lora_jax.settings.schema import join_method

METHODS: Mapping[str, type[Method]] = MappingProxyType(
    {
        "lora": LoRA,
        "rslora": RsLoRA,
        "lora_plus": LoRAPlus,
        "lora_fa": LoRAFA,
        "dora": DoRA,
        "pissa": PiSSA,
        "vera": VeRA,
        "lora_xs": LoRAXS,
        "intrinsic": IntrinsicDimension,
        "uni_lora": UniLoRA,
        "full": FullFineTuning,
        "bitfit": BitFit,
        "head": HeadOnly,
    }
)


# Methods whose `train` is the caller's to choose; that of the others is what they are.
_WITH_WHOLE = LoRA | HeadOnly | IntrinsicDimension | UniLoRA
# (A rank above the matrix's is for adapters that come so, not for a config to ask for.)
_RULE_FIELDS = tuple(f.name for f in dataclasses.fields(Rule) if f.name != "any_rank")


def settings_of(kind: type[Method]) -> tuple[str, ...]:
    """The settings that a method takes, beside `train`, `rows`, `axes` and `aliases`.

    >>> settings_of(HeadOnly), "ratio" in settings_of(METHODS["lora_plus"])
    ((), True)
    """
    if not issubclass(kind, LoRA):
        shared = {field.name for field in dataclasses.fields(Method)} | {"axes"}
        return tuple(f.name for f in dataclasses.fields(kind) if f.name not in shared)
    of_rule = [name for name in _RULE_FIELDS if name not in kind.WITHOUT]
    shared = {field.name for field in dataclasses.fields(LoRA)}
    own = [field.name for field in dataclasses.fields(kind) if field.name not in shared]
    return (*of_rule, "rules", *own)


def all_settings() -> tuple[str, ...]:
    """Every setting that some method takes, each once."""
    return tuple(dict.fromkeys(name for kind in METHODS.values() for name in settings_of(kind)))


def _fields_of(kind: type[Method]) -> list[dataclasses.Field]:
    """The fields of the class, or of its rules, that a config sets."""
    of_rule = dataclasses.fields(Rule) if issubclass(kind, LoRA) else ()
    fields = {field.name: field for field in (*dataclasses.fields(kind), *of_rule)}
    return [fields[name] for name in settings_of(kind)]


for _name, _kind in METHODS.items():
    join_method(_name, _fields_of(_kind), moves_all=_kind.ALONE)


def kind_of(name: Any) -> type[Method]:
    """The class of this name. Raises `RequestError` with the nearest."""
    if not isinstance(name, str) or name not in METHODS:
        raise RequestError(f"method.name={name!r} is unknown; {nearest(str(name), METHODS)}")
    return METHODS[name]


def method_of(name: str, settings: Mapping[str, Any], *, axes: Any, aliases: Any) -> Method:
    """The method of this name with what `settings` holds for it.

    `settings` may hold what means nothing to this method, as one config serves several: VeRA has no
    alpha, full fine-tuning no rank. Empty strings and None mean the default. Where `rules` holds
    rules, `Rule`s or plain mappings, a mapping takes what it does not say from the settings beside.
    Raises `RequestError` for an unknown name or values that the method refuses.
    """
    kind = kind_of(name)
    wanted = (*settings_of(kind), *(("rows", "train") if issubclass(kind, _WITH_WHOLE) else ()))
    given = {
        key: settings[key]
        for key in wanted
        if key in settings and settings[key] is not None and settings[key] != ""
    }
    if issubclass(kind, LoRA | UniLoRA):
        given["axes"] = axes
    if issubclass(kind, LoRA) and given.get("rules"):
        of_rule = {key: given.pop(key) for key in _RULE_FIELDS if key in given}
        given["rules"] = [_rule_of(rule, of_rule, kind) for rule in given["rules"]]
    return kind(aliases=aliases, **given)


def _rule_of(rule: Any, beside: Mapping[str, Any], kind: type[LoRA]) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, Mapping):
        raise RequestError(
            f"method.rules holds {rule!r}; each rule is a mapping such as "
            "{'targets': 'q', 'rank': 4}"
        )
    for key in rule:
        if key in kind.WITHOUT:
            raise RequestError(f"{kind.__name__} has no {key}: {kind.WITHOUT[key]}")
        if key not in _RULE_FIELDS:
            raise RequestError(
                f"a rule of method.rules has no {key!r}; {nearest(key, _RULE_FIELDS)}"
            )
    if "targets" not in rule:
        raise RequestError(f"the rule {dict(rule)!r} of method.rules names no targets")
    return Rule(**{**beside, **rule})
