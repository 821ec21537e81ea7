"""PEFT's `adapter_config.json`: read with every field accounted for, and PEFT's own matching."""

from __future__ import annotations

import dataclasses
import functools
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.io import matching
from lora_jax.models.config_fields import Fields, Flag, Probability, one_of, read_json

CONFIG = "adapter_config.json"
F = TypeVar("F", bound=Callable[..., Any])
_LONGEST = 10_000  # of expressions: longer than any
BIASES = ("none", "lora_only", "all")

# Fields that change what is computed and are not implemented, with the value that means "off".
_REFUSED: Mapping[str, str] = {
    "lora_bias": "a bias on B",
    "target_parameters": "adapters on bare parameters (experts)",
    "trainable_token_indices": "single trained rows of an embedding",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "layer_replication": "replicated layers",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
}
# These starts rewrite the base model, so A and B alone do not say what the adapter is.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "eva_base", "lora_ga")
# Fields that say how an adapter was begun, where it came from, or who asked for it.
_NEUTRAL = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision", "runtime_config", "fan_in_fan_out",
}  # fmt: skip


def _names(fields: Fields, name: str, default: Any) -> str | tuple[str, ...]:
    """A regular expression, or a list of names."""
    value = fields.value(name, None)
    if isinstance(value, str) and value:
        _check_expression(value, name, fields.place)
        return value
    listed = _listed(fields, name)
    if default != () and not listed:
        raise fields.error(name, value, "a list of module names, or a regular expression")
    return listed


def _expressions(fields: Fields, name: str, default: Any) -> tuple[str, ...]:
    """Names that PEFT puts into regular expressions as they are."""
    listed = _listed(fields, name)
    for value in listed:
        _check_expression(value, name, fields.place)
    return listed


def _listed(fields: Fields, name: str) -> tuple[str, ...]:
    value = fields.value(name, "")
    if value == "":
        return ()
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(v, str) and v for v in listed):
        raise fields.error(name, value, "a list of names")
    return tuple(listed)


def _layers(fields: Fields, name: str, default: Any) -> tuple[int, ...] | None:
    value = fields.value(name, [])
    listed = value if isinstance(value, list) else [value]
    if not all(type(n) is int and n >= 0 for n in listed):
        raise fields.error(name, value, "a layer's number or a list of them")
    return tuple(listed) or None


def _pattern(read: Callable[[Fields, str], Any]) -> Callable[..., tuple[tuple[str, Any], ...]]:
    """Reads an object whose keys are expressions, and its values by `read`."""

    def pattern(fields: Fields, name: str, default: Any) -> tuple[tuple[str, Any], ...]:
        found = fields.mapping(name) or {}
        for key in found:
            _check_expression(key, name, fields.place)
        inner = fields.inner(name, found)
        return tuple((key, read(inner, key)) for key in found)

    return pattern


def _text(fields: Fields, name: str, default: Any) -> str | None:
    value = fields.value(name, None)
    return value if isinstance(value, str) else None


def _check_expression(text: str, name: str, place: str) -> None:
    if len(text) > _LONGEST:
        raise RequestError(
            f"{place}: {name} holds {reprlib.repr(text)} of {len(text)} characters, more than "
            f"{_LONGEST}; write the modules as a list"
        )
    try:
        # As they will be put together: what stands alone may not stand within another.
        for whole in (
            text,
            rf"(^|.*\.){text}($|\..*)",
            rf"(.*\.)?({text})$",
            rf"(?:^|.*?\.){text}\.(?P<layer>\d+)\.",
        ):
            matching.compile(whole)
    except (re.error, OverflowError, RecursionError) as error:
        raise RequestError(
            f"{place}: {name} holds {reprlib.repr(text)}, which is no regular expression: {error}"
        ) from error


NamesOrExpression = Annotated[str | tuple[str, ...], _names]
Expressions = Annotated[tuple[str, ...], _expressions]


def _naming_place(method: F) -> F:
    """The method of `PeftConfig` with the file's place before what its errors say."""

    @functools.wraps(method)
    def named(self, *args, **kwargs):
        try:
            return method(self, *args, **kwargs)
        except RequestError as error:
            raise RequestError(f"{self.place}: {error}") from error

    return cast(F, named)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftConfig:
    """The fields of a LoRA's `adapter_config.json` that say what is computed.

    Module names are those of the model that PEFT wrapped ("model.layers.0.self_attn.q_proj"). The
    matching is PEFT 0.21's own: `targets`, `rank_of`, `alpha_of`, `saves`.
    """

    r: int
    lora_alpha: float
    target_modules: NamesOrExpression
    exclude_modules: NamesOrExpression = ()
    modules_to_save: Expressions = ()
    bias: Annotated[str, one_of(*BIASES)] = "none"
    use_rslora: Flag = False
    use_dora: Flag = False
    rank_pattern: Annotated[tuple[tuple[str, int], ...], _pattern(Fields.integer)] = ()
    alpha_pattern: Annotated[tuple[tuple[str, float], ...], _pattern(Fields.positive)] = ()
    layers_to_transform: Annotated[tuple[int, ...] | None, _layers] = None
    layers_pattern: Expressions = ()
    lora_dropout: Probability = 0.0
    task_type: Annotated[str | None, _text] = None
    ensure_weight_tying: Flag = False
    place: str = CONFIG
    has_parameters: bool = False

    @classmethod
    def read(cls, path: Path, *, with_parameters: bool = False) -> PeftConfig:
        """Reads the file. Adapters on bare parameters (experts) are an error unless
        `with_parameters`. Raises `RequestError` for what is missing, malformed or not implemented.

        Unknown fields that are null, false or empty are ignored, and so are unknown notes; an
        unknown field that switches something on ("use_…": true, "…_config": {…}) is refused.
        """
        raw, place = read_json(path, kind=dict), str(path)
        check_is_peft(raw, place)
        fields = Fields(raw, place)
        fields.choice("peft_type", ["LORA"])
        known = _NEUTRAL | {field.name for field in dataclasses.fields(cls)}
        for name, value in raw.items():
            if name in known or not value or (name == "target_parameters" and with_parameters):
                continue
            is_switch = name.startswith("use_") or name.endswith("_config")
            if name in _REFUSED or (is_switch and (value is True or isinstance(value, dict))):
                what = _REFUSED.get(name, "an option that this version does not know")
                raise RequestError(
                    f"{place}: {name} is {value!r}, {what}, which changes the numbers and is not "
                    "implemented; merge the adapter with peft and load the merged model"
                )
        start = raw.get("init_lora_weights", True)
        if isinstance(start, str) and start.lower().startswith(_BASE_CHANGING):
            raise RequestError(
                f"{place}: init_lora_weights is {start!r}, which rewrites the base model, so A and "
                "B alone do not say the change; save it with peft's "
                "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
        # Bare parameters need no modules next to them.
        alone = with_parameters and not raw.get("target_modules")
        return fields.config(
            cls,
            **({"target_modules": ()} if alone else {}),
            r=fields.integer("r", 8, maximum=2**20),
            lora_alpha=fields.positive("lora_alpha", 8),
            place=place,
            has_parameters=bool(raw.get("target_parameters")),
        )

    @_naming_place
    def targets(self, module: str, *, is_linear: bool, is_output: bool) -> bool:
        """Whether PEFT would put an adapter on this module.

        `is_linear` and `is_output` (the model's last layer) matter to "all-linear" alone. Raises
        `RequestError` for an expression that takes too long.
        """
        if _is_among(module, self.exclude_modules):
            return False
        if any(
            matching.compile(rf"(^|.*\.){name}($|\..*)").match(module)
            for name in self.modules_to_save
        ):
            return False
        wanted = self.target_modules
        if isinstance(wanted, str):
            if wanted.lower() == "all-linear":
                return is_linear and not is_output
            return matching.compile(wanted).fullmatch(module) is not None
        if module in wanted:
            return True
        return _is_among(module, wanted) and self._is_in_layers(module)

    def _is_in_layers(self, module: str) -> bool:
        if self.layers_to_transform is None:
            return True
        starts = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_pattern] or [r".*?\.[^.]*"]
        for start in starts:
            found = matching.compile(rf"{start}\.(?P<layer>\d+)\.").match(module)
            if found is not None:
                return int(found["layer"]) in self.layers_to_transform
        return False

    @_naming_place
    def rank_of(self, module: str) -> int:
        """The module's rank: the first match in `rank_pattern`, else `r`."""
        return _first(self.rank_pattern, module, self.r)

    @_naming_place
    def alpha_of(self, module: str) -> float:
        """The module's alpha: the first match in `alpha_pattern`, else `lora_alpha`."""
        return _first(self.alpha_pattern, module, self.lora_alpha)

    def warn_of_idle_keys(self, modules: Sequence[str], *, stacklevel: int = 3) -> None:
        """Warns of keys that match none of the adapted modules: PEFT ignores them silently."""
        for field in ("rank_pattern", "alpha_pattern"):
            for key in self.idle_keys(field, modules):
                warnings.warn(
                    f"{self.place}: {field} names {key!r}, which matches no adapted module, so "
                    f"those have r={self.r} and lora_alpha={self.lora_alpha:g} unless another key "
                    f"matches; {nearest(key, modules)}",
                    UserWarning,
                    stacklevel=stacklevel,
                )

    def idle_keys(self, field: str, modules: Sequence[str]) -> list[str]:
        """Keys of `rank_pattern` or `alpha_pattern` that match none of these modules."""
        keys = [key for key, _ in getattr(self, field)]
        return [
            key for key in keys if not any(_first(((key, True),), name, False) for name in modules)
        ]

    def saves(self, module: str) -> bool:
        """Whether the module, or one that holds it, is trained whole."""
        return any(holder.endswith(self.modules_to_save) for holder in holders(module))


def holders(module: str) -> list[str]:
    """The module's name and those of the modules that hold it."""
    parts = module.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def check_is_peft(raw: Mapping[str, Any], place: str) -> None:
    """Raises `RequestError` for an `adapter_config.json` of another program."""
    if raw.get("peft_type") is not None:
        return
    if "fine_tune_type" in raw or "lora_parameters" in raw:
        raise RequestError(
            f"{place} is mlx-lm's (fine_tune_type, lora_parameters), whose adapters are not read; "
            "fuse the adapter there (mlx_lm.fuse) and load the fused model"
        )
    raise RequestError(
        f"{place} lacks peft_type, so it is not an adapter that peft saved; give the folder that "
        "peft's save_pretrained, or lora-jax convert, wrote"
    )


def _is_among(module: str, names: str | Iterable[str]) -> bool:
    if isinstance(names, str):
        return matching.compile(names).fullmatch(module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _first(pattern: tuple[tuple[str, Any], ...], module: str, default: Any) -> Any:
    for key, value in pattern:
        if matching.compile(rf"(.*\.)?({key})$").match(module):
            return value
    return default
