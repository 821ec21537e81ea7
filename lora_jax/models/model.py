"""`Model`: a pure function, its parameters, and what is needed to feed and to adapt them."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from lora_jax.core.axes import KernelAxes, kernel_axes
from lora_jax.core.errors import RequestError
from lora_jax.core.hashes import hash_params
from lora_jax.core.rules import Part
from lora_jax.models.attention import Cache
from lora_jax.models.decoder import make_cache
from lora_jax.models.families import CAUSAL_LM, Family, family_of
from lora_jax.models.functional import flatten
from lora_jax.quant.weight import NF4Weight

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NO_HEAD = r"(?!)"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A pretrained model ready to run, adapt and save.

    `apply(params, input_ids, attention_mask=None, *, output_hidden_states=False, dropout_key=None)`
    is pure and lifted: `params` are nested plain dicts, kernels (in, out), as in `params` here or
    as `method.bind(trainable, frozen)` gives them. Encoders (`kind` "encoder") also take
    `token_type_ids` and give the last hidden state (B, T, D); decoders ("causal-lm") also take
    `position_ids` and `cache` and give logits (B, T, vocab). With a head ("classification",
    "regression") both give (B, num_labels). `output_hidden_states=True` returns that with the tuple
    of hidden states. `aliases` are regexes of parameter paths by short name, `head_pattern` the one
    of the task head's; `head_is_new` says that the head was drawn, not loaded; `labels` are what
    the file's config.json says of its outputs (`id2label`, `problem_type`).
    """

    name: str
    config: Any
    params: dict[str, Any]
    apply: Callable[..., Any]
    aliases: Mapping[str, str | Part]
    pooling: str
    stored_tokenizer: Tokenizer | None = None
    head: str | None = None
    num_labels: int | None = None
    head_pattern: str = NO_HEAD
    head_is_new: bool = False
    eos_token_ids: tuple[int, ...] = ()
    labels: Mapping[str, Any] | None = None

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    def kind(self) -> str:
        """ "encoder" or "causal-lm"."""
        return self.family.kind

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer. Raises `RequestError` if it was loaded without one."""
        if self.stored_tokenizer is None:
            raise RequestError(
                f"model {self.name} was loaded without a tokenizer; put its tokenizer.json into "
                "the folder and load it with tokenizer=True, or give token ids"
            )
        return self.stored_tokenizer

    @property
    def eos_token_id(self) -> int | None:
        """The first of the tokens that end a text, None if the model has none."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @property
    def pad_token_id(self) -> int:
        """What fills batches up: the config's padding, else the end of a text, else 0."""
        own = self.config.pad_token_id
        return own if own is not None else (self.eos_token_id or 0)

    @functools.cached_property
    def axes(self) -> dict[str, KernelAxes]:
        """`{path: KernelAxes}` of the parameters, by a trace (no compute) when first asked for."""
        tokens = jax.ShapeDtypeStruct((2, 3), "int32")
        inputs = (tokens,) * (2 if self.kind == CAUSAL_LM else 3)
        return kernel_axes(self.apply, self.params, *inputs)

    @functools.cached_property
    def base_hash(self) -> str:
        """sha256 (hex) of the base weights, a task's head left out; computed when first asked for.

        Stacked layers hash as the same layers unstacked do.
        """
        flat = flatten(self.params)
        base = {p: x for p, x in flat.items() if not re.fullmatch(self.head_pattern, p)}
        return hash_params(unstack_layers(self.config, base))

    @functools.cached_property
    def body_hash(self) -> str:
        """sha256 (hex) of what is the same whatever head, tied or not, the model has."""
        flat = unstack_layers(self.config, flatten(self.params))
        body = {p: x for p, x in flat.items() if not p.startswith(("head/", "pooler/"))}
        return hash_params(body)

    def make_cache(self, *, batch_size: int, length: int, dtype: Any = None) -> Cache:
        """An empty `Cache` for `length` columns; in the embedding's dtype by default.

        Raises `RequestError` for a model that does not decode, or a length beyond its positions.
        """
        if self.kind != CAUSAL_LM or self.head is not None:
            raise RequestError(
                f"model {self.name} is no language model (its kind is {self.kind!r}, its head "
                f"{self.head!r}); load a decoder with head=None"
            )
        dtype = flatten(self.params)["embed/embedding"].dtype if dtype is None else dtype
        return make_cache(self.config, batch_size=batch_size, length=length, dtype=dtype)


def unstack_layers(config: Any, flat: Mapping[str, Any]) -> dict[str, Any]:
    """`{path: array or shape}` with stacked parameters layer by layer; plain ones as they are."""
    if not getattr(config, "scan_layers", False):
        return dict(flat)
    out: dict[str, Any] = {}
    for path, array in flat.items():
        if path.startswith("layers/"):
            rest = path.removeprefix("layers/")
            numbers = range(config.num_hidden_layers)
            out |= {f"layers/{n}/{rest}": _layer_of(array, n) for n in numbers}
        else:
            out[path] = array
    return out


def _layer_of(array: Any, number: int) -> Any:
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(array.shape[1:], array.dtype)
    return array.layer(number) if isinstance(array, NF4Weight) else array[number]
