"""The Llama family's names in Hugging Face files."""

from __future__ import annotations

from lora_jax.models.family import CAUSAL_LM, Family
from lora_jax.models.hf_names import Entry, layer_entries, linear, norm
from lora_jax.models.llama.config import LlamaConfig, class_name, llama_aliases
from lora_jax.models.llama.modeling import Llama


def llama_entries(config: LlamaConfig) -> list[Entry]:
    """The entry of every parameter of the decoder, without its head."""
    entries = [Entry("model.embed_tokens.weight", "embed/embedding")]
    for number in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{number}", "layers/{}"
        of_layer = [
            *norm(f"{theirs}.input_layernorm", f"{ours}/attention_norm", bias=False),
            *norm(f"{theirs}.post_attention_layernorm", f"{ours}/mlp_norm", bias=False),
        ]
        for name in "qkvo":
            bias = config.o_bias if name == "o" else config.qkv_bias
            module = f"{theirs}.self_attn.{name}_proj"
            of_layer += linear(module, f"{ours}/attention/{name}", bias=bias)
        for name in ("gate", "up", "down"):
            module = f"{theirs}.mlp.{name}_proj"
            of_layer += linear(module, f"{ours}/mlp/{name}", bias=config.mlp_bias)
        entries += layer_entries(of_layer, number, stacked=config.scan_layers)
    entries += norm("model.norm", "norm", bias=False)
    return entries


LLAMA = Family(
    kind=CAUSAL_LM,
    config=LlamaConfig,
    module=Llama,
    entries=llama_entries,
    ignored=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),  # buffers of old files
    aliases=llama_aliases,
    prefix="model.",
    class_name=class_name,
)
