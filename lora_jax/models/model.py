"""`Model`: a pure function, its parameters, and what is needed to feed and to adapt them."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from tokenizers import Tokenizer

from lora_jax.core.axes import KernelAxes, kernel_axes
from lora_jax.core.hashes import hash_params
from lora_jax.models.functional import flatten


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A pretrained model ready to run, adapt and save.

    `apply(params, input_ids, attention_mask, token_type_ids=None, *, output_hidden_states=False,
    dropout_key=None)` is pure; `params` are nested plain dicts, kernels (in, out). With `head=None`
    it returns the last hidden state (B, T, D), with "classification" logits (B, num_labels);
    `output_hidden_states=True` returns them with the tuple of hidden states. `aliases` are regexes
    of parameter paths by short name, `head_pattern` the one of the task head's; `head_is_new` says
    that the head was drawn, not loaded.
    """

    name: str
    config: Any
    params: dict[str, Any]
    apply: Callable[..., Any]
    tokenizer: Tokenizer
    aliases: Mapping[str, str]
    pooling: str
    head: str | None = None
    num_labels: int | None = None
    head_pattern: str = r"head/.*"
    head_is_new: bool = False

    @functools.cached_property
    def axes(self) -> dict[str, KernelAxes]:
        """`{path: KernelAxes}` of the parameters, by a trace (no compute) when first asked for."""
        tokens = jax.ShapeDtypeStruct((2, 3), "int32")
        return kernel_axes(self.apply, self.params, tokens, tokens, tokens)

    @functools.cached_property
    def base_hash(self) -> str:
        """sha256 (hex) of the base weights, the head left out; computed when first asked for."""
        flat = flatten(self.params)
        return hash_params(
            {p: x for p, x in flat.items() if not re.fullmatch(self.head_pattern, p)}
        )
