"""A GGUF file of architecture "llama", read as the Hugging Face folder it was made from.

llama.cpp's names and layouts: `convert_hf_to_gguf.py` there (class `LlamaModel`).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.gguf.reader import GgufFile
from lora_jax.io.lazy import LazyMapping
from lora_jax.models.attention import rope_frequencies

_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSOR = re.compile(r"(?:blk\.(0|[1-9][0-9]*)\.)?(\w+)\.(weight|bias)", re.ASCII)
_EMBEDDING, _HEAD, _ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

# Metadata keys (after "llama.") that `gguf_config` reads, or that do not change what is computed.
_READ = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.factor",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "tensor_data_layout",
    "vocab_size",
}
# And those that do, unless they have this value.
_NEUTRAL = {
    "attention.causal": True,
    "expert_count": 0,
    "expert_used_count": 0,
    "pooling_type": 0,
    "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
}
# Llama 3.1 and later, all sizes; the factor differs and is read off the file.
_LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def gguf_config(file: GgufFile) -> dict[str, Any]:
    """Returns what the model's `config.json` says, as an object with model_type "llama".

    `rope_scaling` is None, linear, or Llama 3's; the token ids are None where the file has none.
    Raises `RequestError` for another architecture, for metadata that is missing, of a wrong type or
    inconsistent, and for whatever would make the model compute something that is not said here.
    """
    _check_is_llama(file)
    hidden_size = file.integer("llama.embedding_length", minimum=1)
    num_heads, num_kv_heads = _head_counts(file)
    head_dim = _head_dim(file, hidden_size, num_heads)
    vocab_size = _vocab_size(file)
    rope_theta = _decimal(file.positive("llama.rope.freq_base", 10000.0))
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": file.integer("llama.feed_forward_length", minimum=1),
        "num_hidden_layers": file.integer("llama.block_count", minimum=1),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _decimal(file.positive("llama.attention.layer_norm_rms_epsilon")),
        "rope_theta": rope_theta,
        "rope_scaling": _rope_scaling(file, rope_theta, head_dim),
        "max_position_embeddings": file.integer("llama.context_length", minimum=1),
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in file.tensors,
        "tie_word_embeddings": _HEAD not in file.tensors,
        "bos_token_id": _token_id(file, "bos", vocab_size),
        "eos_token_id": _token_id(file, "eos", vocab_size),
        "pad_token_id": _token_id(file, "padding", vocab_size),
    }


class LlamaTensors(LazyMapping):
    """What `gguf_tensors` returns; each access reads and expands one tensor."""

    def __init__(self, file: GgufFile, sources: Mapping[str, str]):
        super().__init__(sources, self._in_hf_order)
        self._file, self._sources = file, sources
        queries, keys = _head_counts(file)
        self._heads: dict[str, int] = {"attn_q": queries, "attn_k": keys}

    def shape_of(self, name: str) -> tuple[int, ...]:
        """Returns the shape that `self[name]` will have, without reading it."""
        return self._file.tensors.shape_of(self._sources[name])

    def _in_hf_order(self, name: str) -> np.ndarray:
        """Undoes, in place, the order of rows in which llama.cpp rotates pairs of neighbours.

        Hugging Face rotates row i of a head with row i + d / 2, llama.cpp row 2 i with 2 i + 1.
        """
        source = self._sources[name]
        heads, tensor = self._heads.get(_parsed(source)[1]), self._file.tensors[source]
        if heads is None:
            return tensor
        if tensor.ndim == 0 or len(tensor) % (2 * heads):
            raise RequestError(
                f"{self._file.path}: tensor {source!r} of shape {tensor.shape} is not for {heads} "
                "heads; convert the model again"
            )
        # Head by head, so that a second copy of the whole is never there.
        for head in tensor.reshape(heads, len(tensor) // heads, -1):
            head[:] = np.concatenate([head[0::2], head[1::2]])
        return tensor


def gguf_tensors(file: GgufFile) -> LlamaTensors:
    """Returns the tensors lazily under Hugging Face's names, `{name: float32 array (out, in)}`.

    The rows of queries and keys are in Hugging Face's order. A tensor that is not known is there
    under its own name; `rope_freqs.weight` is not, since `gguf_config` says it or refuses it.
    Raises `RequestError` for another architecture, and where the counts of heads are missing.
    """
    _check_is_llama(file)
    sources = {_hf_name(source): source for source in file.tensors if source != _ROPE_FACTORS}
    for source in file.tensors:
        if _hf_name(source) == source and source.startswith(("model.", "lm_head.")):
            # Under this name it would pass for one whose rows are in order.
            raise RequestError(
                f"{file.path} names a tensor {source!r}, as Hugging Face does and GGUF does "
                "not; convert the model again with llama.cpp's convert_hf_to_gguf.py"
            )
    return LlamaTensors(file, sources)


def _check_is_llama(file: GgufFile) -> None:
    architecture = file.text("general.architecture")
    advice = "load the model from its Hugging Face folder"
    if architecture != "llama":
        raise RequestError(
            f"{file.path} is of architecture {architecture!r}, and of GGUF files only 'llama' is "
            f"read; {advice}"
        )
    if file.integer("split.count", 1) > 1:
        raise RequestError(
            f"{file.path} is one of {file.integer('split.count')} parts; join them with "
            "llama.cpp's llama-gguf-split --merge"
        )
    for key, value in file.metadata.items():
        short = key.removeprefix("llama.")
        if short == key or short in _READ or (short in _NEUTRAL and value == _NEUTRAL[short]):
            continue
        raise file.refusal(
            key, f"which may change what the model computes and is not read; {advice}"
        )


def _head_counts(file: GgufFile) -> tuple[int, int]:
    num_heads = file.integer("llama.attention.head_count", minimum=1)
    num_kv_heads = file.integer("llama.attention.head_count_kv", num_heads, minimum=1)
    if num_heads % num_kv_heads:
        raise file.error("llama.attention.head_count_kv", f"a divisor of {num_heads} heads")
    return num_heads, num_kv_heads


def _head_dim(file: GgufFile, hidden_size: int, num_heads: int) -> int:
    key = "llama.attention.key_length"
    if key not in file.metadata and hidden_size % num_heads:
        raise file.error("llama.embedding_length", f"a multiple of {num_heads} heads")
    head_dim = file.integer(key, hidden_size // num_heads, minimum=1)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if file.integer(key, head_dim) != head_dim:
            raise file.error(key, f"the width of a head, {head_dim}")
    return head_dim


def _vocab_size(file: GgufFile) -> int:
    key = "llama.vocab_size"
    shape = file.tensors.shape_of(_EMBEDDING) if _EMBEDDING in file.tensors else ()
    if len(shape) != 2:  # Which the accounting of tensors will say.
        return file.integer(key, minimum=1)
    if file.integer(key, shape[0]) != shape[0]:
        raise file.error(key, f"the rows of {_EMBEDDING}, {shape[0]}")
    return shape[0]


def _token_id(file: GgufFile, name: str, vocab_size: int) -> int | None:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = file.integer(key, None)
    if token_id is not None and token_id >= vocab_size:
        raise file.error(key, f"below the size of the vocabulary, {vocab_size}")
    return token_id


def _rope_scaling(file: GgufFile, theta: float, head_dim: int) -> dict[str, Any] | None:
    # llama.cpp takes a factor without a type for a linear one, too.
    key = "llama.rope.scaling.type"
    kind = file.text(key, "linear")
    if kind not in ("none", "linear"):
        raise file.error(key, "'none' or 'linear'")
    old = file.positive("llama.rope.scale_linear", 1.0)
    factor = _decimal(file.positive("llama.rope.scaling.factor", old))
    linear = None
    if kind == "linear" and factor != 1.0:
        linear = {"rope_type": "linear", "factor": factor}
    if _ROPE_FACTORS not in file.tensors:
        return linear
    factors = file.tensors[_ROPE_FACTORS]
    is_plain = linear is None and factors.shape == (head_dim // 2,)
    if is_plain and 1.0 <= factors.max() < math.inf:
        llama3 = {"rope_type": "llama3", "factor": _decimal(float(factors.max())), **_LLAMA3_ROPE}
        plain, slower = (rope_frequencies(head_dim, theta, x) for x in (None, llama3))
        if np.allclose(factors, np.divide(plain, slower), rtol=1e-4):
            return llama3
    raise RequestError(
        f"{file.path}: tensor {_ROPE_FACTORS!r} stretches the rotary embedding otherwise than "
        "Llama 3.1 and 3.2 do, which is not read; load the model from its Hugging Face folder"
    )


def _hf_name(source: str) -> str:
    layer, name, part = _parsed(source)
    if layer is None:
        return f"{_NAMES[name]}.{part}" if name in _NAMES else source
    if name in _LAYER_NAMES:
        return f"model.layers.{layer}.{_LAYER_NAMES[name]}.{part}"
    return source


def _parsed(source: str) -> tuple[str | None, str, str]:
    if (match := _TENSOR.fullmatch(source)) is None:
        return None, source, ""
    layer, name, part = match.groups()
    return layer, name, part


def _decimal(value: float) -> float:
    """Returns the shortest decimal of a float32 (1e-05 for 9.999999747378752e-06)."""
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value
