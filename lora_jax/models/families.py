"""The model families by `model_type`: one file of modules, one of names, one line here."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from flax import nnx

from lora_jax.core.errors import RequestError
from lora_jax.models import bert, bert_hf
from lora_jax.models.hf_names import Entry


@dataclasses.dataclass(frozen=True)
class Family:
    """What loading and saving need to know about one family.

    `config` has `from_json(raw, place)` and `to_json()`; `module(config, num_labels=, pooling=,
    rngs=)` builds the NNX module whose call is `Model.apply`'s; `entries(config)` lists its
    tensors, named as `canonical(tensors)` renames them; `ignored` are regexes of those left aside.
    """

    config: type
    module: Callable[..., nnx.Module]
    entries: Callable[[Any], list[Entry]]
    canonical: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
    ignored: tuple[str, ...]
    aliases: Mapping[str, str]


FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": Family(
            config=bert.BertConfig,
            module=bert.Bert,
            entries=bert_hf.bert_entries,
            canonical=bert_hf.bert_canonical,
            ignored=bert_hf.IGNORED,
            aliases=bert.ALIASES,
        ),
    }
)


def find_family(model_type: Any, place: str) -> Family:
    """Returns the family of a `config.json`'s model_type; `RequestError` lists the known ones."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise RequestError(f"{place}: model_type is {model_type!r}; known model types: {known}")
    return FAMILIES[model_type]


def family_of(config: Any) -> Family:
    """Returns the family that a config object belongs to."""
    return next(f for f in FAMILIES.values() if isinstance(config, f.config))
