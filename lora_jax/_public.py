"""Public names that import their module when they are first used, and extras that are missing."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

# Which extra brings a package that `pip install lora_jax` does not. pyproject.toml agrees (a test).
EXTRA_OF = {
    "gguf": "text", "huggingface_hub": "text", "regex": "text", "safetensors": "text",
    "tokenizers": "text",
    "grain": "data", "pandas": "data", "pyarrow": "data", "tensorboardX": "data",
    "matplotlib": "report",
    "rouge_score": "eval", "sacrebleu": "eval",
    "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow", "alembic": "mlflow",
    "sqlalchemy": "mlflow",
}  # fmt: skip


def needs_extra(error: ModuleNotFoundError) -> str | None:
    """One line that says which extra to install; None if no extra brings the missing module."""
    missing = (error.name or "").partition(".")[0]
    if missing not in EXTRA_OF:
        return None
    return (
        f"this needs {missing}, which is not installed: pip install 'lora_jax[{EXTRA_OF[missing]}]'"
    )


def lazy_names(
    package: str, names_of: Mapping[str, str], *, submodules: str = ""
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`(__getattr__, __dir__, __all__)` of a package whose names are imported when first used.

    Args:
      package: its `__name__`.
      names_of: the names that each module of it gives, separated by blanks.
      submodules: submodules that are public themselves, separated by blanks.
    """
    module_of = {name: module for module, names in names_of.items() for name in names.split()}
    public = sorted({*module_of, *submodules.split()})

    def get(name: str) -> Any:
        if name in module_of:
            module = f"{package}.{module_of[name]}"
        elif name in public:
            module = f"{package}.{name}"
        else:
            near = difflib.get_close_matches(name, public, n=1, cutoff=0.5)
            hint = f"; nearest: {near[0]!r}" if near and not name.startswith("_") else ""
            raise AttributeError(f"module {package!r} has no attribute {name!r}{hint}")
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if line := needs_extra(error):
                raise ModuleNotFoundError(f"{package}.{name}: {line}", name=error.name) from error
            raise
        if name in module_of:
            own = getattr(found, name, None)
            found = importlib.import_module(f"{module}.{name}") if own is None else own
        setattr(sys.modules[package], name, found)  # asked once
        return found

    return get, lambda: sorted({*vars(sys.modules[package]), *public}), public


def call_as(package: str, function: str) -> None:
    """Makes the package itself callable, as its function of that name.

    `lora_jax.train` is a folder of the architecture and a public function. Importing any module of
    the folder sets the attribute `lora_jax.train` to the package, so the package has to be both.
    """

    class Callable(types.ModuleType):
        def __call__(self, *args: Any, **options: Any) -> Any:
            return getattr(self, function)(*args, **options)

        @property
        def __signature__(self) -> inspect.Signature:
            return inspect.signature(getattr(self, function))

    sys.modules[package].__class__ = Callable


def renamed(package: str, **names: tuple[str, str]) -> Callable[[str], Any]:
    """A `__getattr__` for old names, which work for one release and warn.

    `old=("the.module.name", "the.public.name")`: where it is now, and what to call it.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        place, public = names[name]
        module, _, found = place.rpartition(".")
        warnings.warn(
            f"{package}.{name} is now {public}; the old name goes in the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(importlib.import_module(module), found)

    return get
