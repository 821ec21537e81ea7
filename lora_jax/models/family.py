"""`Family`: what loading, saving and decoding need to know about one kind of model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flax import nnx

from lora_jax.core.rules import Part
from lora_jax.models.hf_names import Entry, linear

ENCODER, CAUSAL_LM = "encoder", "causal-lm"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """What loading, saving and decoding need to know about one family.

    `config` has `from_json(raw, place)` and `to_json()`; `module(config, num_labels=, pooling=,
    rngs=)` builds the NNX module whose call is `Model.apply`'s; `entries(config)` lists its tensors
    without any head; `ignored` are regexes of those left aside; `aliases(config)` are short names
    of parameters.

    `classifier` are the entries of the head that transformers' class for sequence classification
    has, `pooler` those of what it stands on. `prefix` is what `entries` leave out, or hold, of the
    name that a module has in transformers' classes with a head; `head_modules` are the heads there.
    `class_name` is what those classes begin with.
    """

    kind: str
    config: type
    module: Callable[..., nnx.Module]
    entries: Callable[[Any], list[Entry]]
    ignored: tuple[str, ...]
    aliases: Callable[[Any], Mapping[str, str | Part]]
    prefix: str
    class_name: Callable[[Any], str]
    classifier: Sequence[Entry] = tuple(linear("score", "head", bias=False))
    head_modules: tuple[str, ...] = ("lm_head", "score")
    pooler: Sequence[Entry] = ()

    def lm_head(self, config: Any) -> list[Entry]:
        """The entries of a language model's own head: none where it is tied."""
        if self.kind != CAUSAL_LM or config.tie_word_embeddings:
            return []
        return linear("lm_head", "head", bias=False)

    def names(self, names: Iterable[str]) -> dict[str, str]:
        """`{a tensor's name in `entries` or of a head: its name in the file}`.

        Encoders leave the prefix out, and files converted from TensorFlow call a layer norm's
        weight and bias gamma and beta; bare decoders lack the prefix.
        """
        names = list(names)
        if self.kind == CAUSAL_LM:
            is_whole = any(name.startswith(self.prefix) for name in names)
            heads = tuple(f"{name}." for name in self.head_modules)
            has_name = lambda name: is_whole or name.startswith(heads)  # noqa: E731
            return {name if has_name(name) else f"{self.prefix}{name}": name for name in names}

        def canonical(name: str) -> str:
            name = name.removeprefix(self.prefix)
            name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
            return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)

        renamed = {canonical(name): name for name in names}
        # Two names for one tensor: keep the file's own, so that one is reported as unexpected.
        return renamed if len(renamed) == len(names) else {name: name for name in names}
