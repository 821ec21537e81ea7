"""GPT-2's names in Hugging Face files; its `Conv1D` stores kernels (in, out), as we do."""

from __future__ import annotations

from lora_jax.models.family import CAUSAL_LM, Family
from lora_jax.models.gpt2.modeling import GPT2, GPT2Config, gpt2_aliases
from lora_jax.models.hf_names import Entry, layer_entries, linear, norm


def gpt2_entries(config: GPT2Config) -> list[Entry]:
    """The entry of every parameter of the decoder, without its head."""
    entries = [
        Entry("transformer.wte.weight", "embed/embedding"),
        Entry("transformer.wpe.weight", "position/embedding"),
    ]
    for number in range(config.n_layer):
        theirs, ours = f"transformer.h.{number}", "layers/{}"
        of_layer = [
            *norm(f"{theirs}.ln_1", f"{ours}/attention_norm"),
            *norm(f"{theirs}.ln_2", f"{ours}/mlp_norm"),
            *linear(f"{theirs}.attn.c_attn", f"{ours}/attention/qkv", transposed=False),
            *linear(f"{theirs}.attn.c_proj", f"{ours}/attention/o", transposed=False),
            *linear(f"{theirs}.mlp.c_fc", f"{ours}/mlp/up", transposed=False),
            *linear(f"{theirs}.mlp.c_proj", f"{ours}/mlp/down", transposed=False),
        ]
        entries += layer_entries(of_layer, number, stacked=config.scan_layers)
    entries += norm("transformer.ln_f", "norm")
    return entries


GPT_2 = Family(
    kind=CAUSAL_LM,
    config=GPT2Config,
    module=GPT2,
    entries=gpt2_entries,
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),  # causal masks of old files
    aliases=gpt2_aliases,
    prefix="transformer.",
    class_name=lambda config: "GPT2",
)
