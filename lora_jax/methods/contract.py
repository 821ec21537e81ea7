"""What the class of a method declares; its equation and its starts are in the method's own file."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, cast

from lora_jax.core.arguments import NamedSettings
from lora_jax.core.errors import RequestError

# Names that variants of earlier versions define or read.
RENAMED = MappingProxyType(
    {
        "FIXED": "FROZEN_PARTS",
        "ALONE": "EXCLUSIVE",
        "PADS": "ZERO_PADDABLE",
        "WITHOUT": "UNSUPPORTED_SETTINGS",
    }
)
_EMPTY: Mapping[str, Any] = MappingProxyType({})


class _Renamed:
    """An attribute under its old name."""

    def __init__(self, old: str):
        self.old = old

    def __get__(self, instance: Any, owner: type) -> Any:
        new = RENAMED[self.old]
        warnings.warn(
            f"{owner.__name__}.{self.old} is now called {new}", DeprecationWarning, stacklevel=2
        )
        return getattr(owner, new)


class Contract(NamedSettings):
    """Class attributes that the trainer, sweeps, files, reports and arithmetic read."""

    # How reports call the method; the name of the class unless the class says otherwise.
    TITLE: ClassVar[str] = "method"
    # The arrays of an adapter, with the roles of their axes: "sir" is (stack…, in…, rank), "" a
    # scalar. See `Site.part_shape`.
    PARTS: ClassVar[Mapping[str, str]] = _EMPTY
    # Parts that stay as `init` made them: they travel with the adapter and never train.
    FROZEN_PARTS: ClassVar[frozenset[str]] = frozenset()
    # Factors on the learning rate and on the weight decay of a part, where they are not 1.
    RATE_MULTIPLIERS: ClassVar[Mapping[str, float]] = _EMPTY
    DECAY_MULTIPLIERS: ClassVar[Mapping[str, float]] = _EMPTY
    # Settings of a rule that have no meaning for the method, with the reason.
    UNSUPPORTED_SETTINGS: ClassVar[Mapping[str, str]] = _EMPTY
    # Where a sweep may pad with zeros: "ranks" if extra zero ranks leave the output unchanged and
    # get zero gradients, "targets" if an adapter of zeros does.
    ZERO_PADDABLE: ClassVar[frozenset[str]] = frozenset()
    # Whether a rank above that of the matrix has a meaning.
    ANY_RANK: ClassVar[bool] = False
    # Whether `init_parts` reads the kernel's numbers, not its dtype alone.
    FROM_KERNEL: ClassVar[bool] = False
    # True if the method updates parameters not listed in `trainable`; it then cannot be combined.
    EXCLUSIVE: ClassVar[bool] = False
    # False for what adds to the computation and not to a parameter: no W + ΔW exists.
    MERGES: ClassVar[bool] = True
    # Whether a subclass's own fields extend `__init__`, instead of `dataclass` generating another.
    EXTENDS_INIT: ClassVar[bool] = False

    FIXED, ALONE, PADS, WITHOUT = map(_Renamed, RENAMED)

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        for old in [name for name in RENAMED if name in vars(cls)]:
            new = RENAMED[old]
            warnings.warn(
                f"{cls.__name__} defines {old}, which is now called {new}; rename it",
                DeprecationWarning,
                stacklevel=2,
            )
            setattr(cls, new, vars(cls)[old])
            delattr(cls, old)
        if "TITLE" not in vars(cls):
            cls.TITLE = cls.__name__
        if cls.EXTENDS_INIT and "__init__" not in vars(cls):
            cls.__init__ = _extended_init(cls)
        _check_parts(cls)


def _extended_init(cls: type[Contract]) -> Any:
    """An `__init__` that takes the fields of `cls` and passes all other settings on.

    `dataclass` generates none where a class has its own, so `init=False` makes no difference.
    """
    parent, decorated = cast(Any, super(cls, cls)), cast(Any, cls)
    inherited, before = parent.__init__, parent.__dataclass_fields__

    @functools.wraps(inherited)
    def __init__(self: Any, **settings: Any):
        is_decorated = "__dataclass_fields__" in vars(cls)
        fields = {f.name: f for f in dataclasses.fields(decorated)} if is_decorated else {}
        for name, field in fields.items():
            if field is not before.get(name) and name not in settings:
                settings[name] = _default(cls, field)
        own = {name: settings.pop(name) for name in fields if name not in before}
        inherited(self, **settings)
        for name, value in own.items():
            object.__setattr__(self, name, value)
        if "__post_init__" in vars(cls):
            vars(cls)["__post_init__"](self)

    return __init__


def _default(cls: type[Contract], field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    if field.default is dataclasses.MISSING:
        raise RequestError(f"{cls.__name__} needs {field.name}=…, which has no default")
    return field.default


def _check_parts(cls: type[Contract]) -> None:
    """Raises `RequestError` for a declaration about a part that an adapter does not have."""
    for part, roles in cls.PARTS.items():
        if not set(roles) <= set("sior"):
            raise RequestError(
                f"{cls.__name__}.PARTS has the roles {roles!r} for {part!r}; each letter is one of "
                "s (stacked), i (in), o (out) and r (rank)"
            )
    for table in ("FROZEN_PARTS", "RATE_MULTIPLIERS", "DECAY_MULTIPLIERS"):
        for part in getattr(cls, table) if cls.PARTS else ():
            if part not in cls.PARTS:
                raise RequestError(
                    f"{cls.__name__}.{table} names the part {part!r}, but PARTS has "
                    f"{', '.join(cls.PARTS)}"
                )
