"""The registry of methods, and methods from a name and plain settings, as configs have them."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.core.rules import Rule
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

# Installed packages name their methods in this group of entry points: `miss = "my_package:MiSS"`.
ENTRY_POINTS = "lora_jax.methods"
_OURS: Mapping[str, type[Method]] = MappingProxyType(
    {
        "lora": LoRA, "rslora": RsLoRA, "lora_plus": LoRAPlus, "lora_fa": LoRAFA, "dora": DoRA,
        "pissa": PiSSA, "vera": VeRA, "lora_xs": LoRAXS, "intrinsic": IntrinsicDimension,
        "uni_lora": UniLoRA, "full": FullFineTuning, "bitfit": BitFit, "head": HeadOnly,
    }
)  # fmt: skip


class _Registry(Mapping[str, type[Method]]):
    """Methods by name: ours, those of `register_method`, and those of installed packages.

    Entry points are loaded when a name is asked for that is not known, or all names are.
    """

    def __init__(self):
        self._kinds = dict(_OURS)
        self._is_complete = False
        self.broken: dict[str, str] = {}

    def add(self, name: str, kind: type[Method]) -> None:
        self._kinds[name] = kind
        _join(name, kind)

    def _complete(self) -> dict[str, type[Method]]:
        if not self._is_complete:
            self._is_complete = True
            for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
                try:
                    if point.name not in self._kinds:
                        self.add(point.name, _checked(point.name, point.load()))
                except Exception as error:  # a package that cannot be imported stops no other
                    self.broken[point.name] = f"{point.value}: {type(error).__name__}: {error}"
        return self._kinds

    def __getitem__(self, name: str) -> type[Method]:
        return self._kinds[name] if name in self._kinds else self._complete()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._complete())

    def __len__(self) -> int:
        return len(self._complete())


METHODS = _Registry()


def register_method(name: str, kind: type[Method]) -> None:
    """Makes a method known by name to configs, cells of sweeps, reports and `verify`.

    It is known in this process; a package that others install names its methods in the entry
    points `lora_jax.methods` instead. Registering a name again replaces its class.

    Args:
      name: what `method.name` in a config, or `method` in a cell of a sweep, says.
      kind: a subclass of `Method`, most often of `LoRA`.

    Raises:
      RequestError: the name is one of this package's own or no identifier, or `kind` is no method.

    """
    METHODS.add(name, _checked(name, kind))


def _checked(name: Any, kind: Any) -> type[Method]:
    if not isinstance(name, str) or not name.isidentifier():
        raise RequestError(f"method name {name!r}: write letters, digits and _, such as 'my_lora'")
    if name in _OURS:
        raise RequestError(f"method name {name!r} is {_OURS[name].__name__}'s; choose another")
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise RequestError(
            f"method {name!r} is {kind!r}; it must be a class derived from lora_jax.LoRA, or from "
            "lora_jax.Method"
        )
    return kind


# Methods whose `train` is the caller's to choose; that of the others is what they are.
_WITH_WHOLE = LoRA | HeadOnly | IntrinsicDimension | UniLoRA
_HEAD = "head/.*"
# (A rank above the matrix's is for adapters that come so, not for a config to ask for.)
_RULE_FIELDS = tuple(f.name for f in dataclasses.fields(Rule) if f.name != "any_rank")


def settings_of(kind: type[Method]) -> tuple[str, ...]:
    """The settings that a method takes, besides `train`, `rows`, `axes` and `aliases`.

    >>> settings_of(HeadOnly), "ratio" in settings_of(METHODS["lora_plus"])
    ((), True)
    """
    if not issubclass(kind, LoRA):
        shared = {field.name for field in dataclasses.fields(Method)} | {"axes"}
        return tuple(f.name for f in dataclasses.fields(kind) if f.name not in shared)
    of_rule = [name for name in _RULE_FIELDS if name not in kind.UNSUPPORTED_SETTINGS]
    shared = {field.name for field in dataclasses.fields(LoRA)}
    own = [field.name for field in dataclasses.fields(kind) if field.name not in shared]
    return (*of_rule, "rules", *own)


def all_settings() -> tuple[str, ...]:
    """Every setting that some method takes, each once."""
    return tuple(dict.fromkeys(name for kind in METHODS.values() for name in settings_of(kind)))


def _join(name: str, kind: type[Method]) -> None:
    """Makes the fields of the class, and of its rules, settings of configs."""
    of_rule = dataclasses.fields(Rule) if issubclass(kind, LoRA) else ()
    fields = {field.name: field for field in (*dataclasses.fields(kind), *of_rule)}
    join_method(name, [fields[key] for key in settings_of(kind)], moves_all=kind.EXCLUSIVE)


for _name, _kind in _OURS.items():
    _join(_name, _kind)


def kind_of(name: Any) -> type[Method]:
    """The class of this name. Raises `RequestError` with the nearest."""
    if isinstance(name, str) and name in METHODS:
        return METHODS[name]
    if isinstance(name, str) and name in METHODS.broken:
        raise RequestError(
            f"method.name={name!r}: its entry point cannot be loaded ({METHODS.broken[name]})"
        )
    raise RequestError(
        f"method.name={name!r} is unknown; {nearest(str(name), METHODS)}, or register your own "
        "with lora_jax.register_method"
    )


def title_of(name: str) -> str:
    """How reports call the method of this name: its class's `TITLE`; an unknown one by name."""
    return METHODS[name].TITLE if name in METHODS else name


def method_of(name: str, settings: Mapping[str, Any], *, axes: Any, aliases: Any) -> Method:
    """The method of this name with what `settings` holds for it.

    `settings` may hold what means nothing to this method, as one config serves several: VeRA has no
    alpha, full fine-tuning no rank. Empty strings and None mean the default. Where `rules` holds
    rules, `Rule`s or plain mappings, keys that a mapping omits are taken from `settings`.
    Raises `RequestError` for an unknown name or values that the method refuses.
    """
    kind = kind_of(name)
    _check_train(kind, name, settings.get("train"))
    wanted = (*settings_of(kind), *(("rows", "train") if issubclass(kind, _WITH_WHOLE) else ()))
    found = {key: settings[key] for key in wanted if key in settings}
    given = {key: value for key, value in found.items() if value is not None and value != ""}
    if issubclass(kind, LoRA | UniLoRA):
        given["axes"] = axes
    if issubclass(kind, LoRA) and given.get("rules"):
        of_rule = {key: given.pop(key) for key in _RULE_FIELDS if key in given}
        given["rules"] = [_rule_of(rule, of_rule, kind) for rule in given["rules"]]
    return kind(aliases=aliases, **given)


def _check_train(kind: type[Method], name: str, train: Any) -> None:
    """Raises `RequestError` where `method.train` is not the method's to choose.

    The head's own pattern passes: it is in configs whose method is changed on the way.
    """
    if issubclass(kind, _WITH_WHOLE) or train in (None, "", _HEAD, (_HEAD,), [_HEAD]):
        return
    raise RequestError(
        f"method.train={train!r} means nothing to method.name={name!r}, which decides itself what "
        "trains whole; to train those parameters and no adapter set method.name='head'"
    )


def _rule_of(rule: Any, defaults: Mapping[str, Any], kind: type[LoRA]) -> Rule:
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, Mapping):
        raise RequestError(
            f"method.rules holds {rule!r}; each rule is a mapping such as "
            "{'targets': 'q', 'rank': 4}"
        )
    for key in rule:
        if key in kind.UNSUPPORTED_SETTINGS:
            raise RequestError(f"{kind.__name__} has no {key}: {kind.UNSUPPORTED_SETTINGS[key]}")
        if key not in _RULE_FIELDS:
            raise RequestError(
                f"a rule of method.rules has no {key!r}; {nearest(key, _RULE_FIELDS)}"
            )
    if "targets" not in rule:
        raise RequestError(f"the rule {dict(rule)!r} of method.rules names no targets")
    return Rule(**{**defaults, **rule})
