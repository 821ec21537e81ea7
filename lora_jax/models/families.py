"""The model families by `model_type`: one folder each (modules, names), one line here."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flax import nnx

from lora_jax.core.errors import RequestError
from lora_jax.core.lift import lift
from lora_jax.core.rules import Part
from lora_jax.models.bert import hf as bert_hf
from lora_jax.models.bert import modeling as bert
from lora_jax.models.functional import functional
from lora_jax.models.gpt2 import hf as gpt2_hf
from lora_jax.models.gpt2 import modeling as gpt2
from lora_jax.models.hf_names import Entry, linear
from lora_jax.models.llama import config as llama_config
from lora_jax.models.llama import hf as llama_hf
from lora_jax.models.llama import modeling as llama
from lora_jax.models.pooling import FAMILY
from lora_jax.models.roberta import hf as roberta_hf
from lora_jax.models.roberta import modeling as roberta

ENCODER, CAUSAL_LM = "encoder", "causal-lm"


@dataclasses.dataclass(frozen=True)
class Family:
    """What loading, saving and decoding need to know about one family.

    `config` has `from_json(raw, place)` and `to_json()`; `module(config, num_labels=, pooling=,
    rngs=)` builds the NNX module whose call is `Model.apply`'s; `entries(config)` lists its tensors
    without any head, named as `names(file's names)` renames them (`{name here: name in the file}`);
    `ignored` are regexes of those left aside; `aliases(config)` are short names of parameters.

    `classifier` are the entries of the head that transformers' class for sequence classification
    has, `pooler` those of what it stands on. `prefix` is what `entries` leave out, or hold, of the
    name that a module has in transformers' classes with a head; `head_modules` are the heads there.
    `class_name` is what those classes begin with, `cache` makes a decoder's `Cache`.
    """

    kind: str
    config: type
    module: Callable[..., nnx.Module]
    entries: Callable[[Any], list[Entry]]
    names: Callable[[Iterable[str]], dict[str, str]]
    ignored: tuple[str, ...]
    aliases: Callable[[Any], Mapping[str, str | Part]]
    classifier: Sequence[Entry]
    prefix: str
    head_modules: tuple[str, ...]
    class_name: Callable[[Any], str]
    pooler: Sequence[Entry] = ()
    cache: Callable[..., Any] | None = None

    def lm_head(self, config: Any) -> list[Entry]:
        """The entries of a language model's own head: none where it is tied."""
        if self.kind != CAUSAL_LM or config.tie_word_embeddings:
            return []
        return linear("lm_head", "head", bias=False)


def decoder_names(names: Iterable[str], *, prefix: str) -> dict[str, str]:
    """`{name in a model with a head: name in the file}`: bare decoders leave the prefix out."""
    names = list(names)
    if any(name.startswith(prefix) for name in names):
        return {name: name for name in names}
    heads = ("lm_head.", "score.")
    return {name if name.startswith(heads) else f"{prefix}{name}": name for name in names}


_SCORE = tuple(linear("score", "head", bias=False))

_BERT = Family(
    kind=ENCODER,
    config=bert.BertConfig,
    module=bert.Bert,
    entries=bert_hf.bert_entries,
    names=bert_hf.bert_names,
    ignored=bert_hf.IGNORED,
    aliases=lambda config: bert.ALIASES,
    classifier=bert_hf.CLASSIFIER,
    pooler=bert_hf.POOLER,
    prefix=bert_hf.PREFIX,
    head_modules=bert_hf.HEAD_MODULES,
    class_name=lambda config: "Bert",
)
_ROBERTA = Family(
    kind=ENCODER,
    config=roberta.RobertaConfig,
    module=roberta.Roberta,
    entries=roberta_hf.roberta_entries,
    names=functools.partial(bert_hf.bert_names, prefix=roberta_hf.PREFIX),
    ignored=roberta_hf.IGNORED,
    aliases=lambda config: roberta.ALIASES,
    classifier=roberta_hf.CLASSIFIER,
    prefix=roberta_hf.PREFIX,
    head_modules=roberta_hf.HEAD_MODULES,
    class_name=lambda config: "Roberta",
)
_GPT2 = Family(
    kind=CAUSAL_LM,
    config=gpt2.GPT2Config,
    module=gpt2.GPT2,
    entries=gpt2_hf.gpt2_entries,
    names=functools.partial(decoder_names, prefix=gpt2_hf.PREFIX),
    ignored=gpt2_hf.IGNORED,
    aliases=gpt2.gpt2_aliases,
    classifier=_SCORE,
    prefix=gpt2_hf.PREFIX,
    head_modules=gpt2_hf.HEAD_MODULES,
    class_name=lambda config: "GPT2",
    cache=gpt2.gpt2_cache,
)
_LLAMA = Family(
    kind=CAUSAL_LM,
    config=llama_config.LlamaConfig,
    module=llama.Llama,
    entries=llama_hf.llama_entries,
    names=functools.partial(decoder_names, prefix=llama_hf.PREFIX),
    ignored=llama_hf.IGNORED,
    aliases=llama_config.llama_aliases,
    classifier=_SCORE,
    prefix=llama_hf.PREFIX,
    head_modules=llama_hf.HEAD_MODULES,
    class_name=llama_config.class_name,
    cache=llama.llama_cache,
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "bert": _BERT,
        "roberta": _ROBERTA,
        "gpt2": _GPT2,
        **dict.fromkeys(llama_config.MODEL_TYPES, _LLAMA),
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
    return next(f for f in FAMILIES.values() if type(config) is f.config)


@functools.lru_cache(maxsize=64)
def functional_model(
    config: Any, num_labels: int | None = None, pooling: str = FAMILY
) -> tuple[Mapping[str, Any], Callable]:
    """`functional` of a config's module, lifted, and traced once: models alike share what is
    compiled."""
    family = family_of(config)
    make = lambda: family.module(  # noqa: E731
        config, num_labels=num_labels, pooling=pooling, rngs=nnx.Rngs(0)
    )
    shapes, call = functional(make)
    return MappingProxyType(shapes), lift(call)
