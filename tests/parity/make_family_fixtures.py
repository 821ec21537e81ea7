"""Makes the fixtures of `test_family_parity.py` with transformers, or checks them against it.

In an environment with torch (CPU), transformers and safetensors:

    python tests/parity/make_family_fixtures.py            # writes tests/fixtures/families/
    python tests/parity/make_family_fixtures.py --check    # recomputes and compares, writes nothing

Weights are drawn once and kept: where a folder exists, only what transformers computes from it is
renewed. To draw one again, remove it.
"""

import shutil
import sys

import numpy as np
import torch
from torch_families import VOCAB, load_folder, make_inputs, outputs, random_model
from torch_reference import FIXTURES, is_check, store
from transformers import (
    BertConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    RobertaConfig,
)

FAMILIES = FIXTURES / "families"

_SIZES = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SIZES, "intermediate_size": 24, "max_position_embeddings": 64}
_ENCODER = {**_SIZES, "intermediate_size": 24, "max_position_embeddings": 20}
_GPT2 = {
    "vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 20,
    "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
}  # fmt: skip
_LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}

# Parameters whose gradients are compared, for one folder of each family.
_OF_LLAMA = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.mlp.gate_proj.weight",
)
_OF_GPT2 = (
    "transformer.wte.weight",
    "transformer.h.0.attn.c_attn.weight",
    "transformer.h.1.mlp.c_fc.weight",
)
_OF_BERT = (
    "embeddings.word_embeddings.weight",
    "encoder.layer.0.attention.self.key.weight",
    "encoder.layer.1.intermediate.dense.weight",
)

# name: (class, config, parameters with gradients)
CASES = {
    "llama": ("LlamaForCausalLM", LlamaConfig(**_LLAMA), _OF_LLAMA),
    "llama_gqa_tied": (
        "LlamaForCausalLM",
        LlamaConfig(**_LLAMA, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters={
            "rope_type": "default", "rope_theta": 500.0,
        }),
        (),
    ),
    "llama_biases": (
        "LlamaForCausalLM",
        LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-2),
        (),
    ),
    "llama_head_dim": (
        "LlamaForCausalLM",
        LlamaConfig(**_LLAMA, head_dim=6, num_key_value_heads=2, hidden_act="gelu"),
        (),
    ),
    "llama_rope_llama3": (
        "LlamaForCausalLM",
        LlamaConfig(**{**_LLAMA, "num_attention_heads": 2}, rope_parameters=_LLAMA3),
        (),
    ),
    "llama_rope_linear": (
        "LlamaForCausalLM", LlamaConfig(**_LLAMA, rope_parameters=_LINEAR), (),
    ),
    "llama_classifier": (
        "LlamaForSequenceClassification",
        LlamaConfig(**_LLAMA, num_key_value_heads=1, pad_token_id=0, num_labels=3),
        (),
    ),
    "mistral_window": (
        "MistralForCausalLM",
        MistralConfig(**_LLAMA, num_key_value_heads=2, sliding_window=4),
        _OF_LLAMA,
    ),
    "qwen2": (
        "Qwen2ForCausalLM",
        Qwen2Config(**_LLAMA, num_key_value_heads=2, tie_word_embeddings=True),
        (*_OF_LLAMA, "model.layers.0.self_attn.q_proj.bias"),
    ),
    "gpt2": ("GPT2LMHeadModel", GPT2Config(**_GPT2), _OF_GPT2),
    "gpt2_inner": (
        "GPT2LMHeadModel",
        GPT2Config(**_GPT2, n_inner=24, activation_function="relu", layer_norm_epsilon=1e-2),
        (),
    ),
    "gpt2_untied": ("GPT2LMHeadModel", GPT2Config(**_GPT2, tie_word_embeddings=False), ()),
    "gpt2_classifier": (
        "GPT2ForSequenceClassification", GPT2Config(**_GPT2, pad_token_id=0, num_labels=3), (),
    ),
    "bert": ("BertModel", BertConfig(**_ENCODER), ()),
    "bert_classifier": (
        "BertForSequenceClassification",
        BertConfig(**_ENCODER, hidden_act="relu", num_labels=3),
        (*(f"bert.{name}" for name in _OF_BERT), "bert.pooler.dense.weight"),
    ),
    "bert_regression": (
        "BertForSequenceClassification",
        BertConfig(**_ENCODER, hidden_act="gelu_new", num_labels=1),
        (),
    ),
    "roberta": (
        "RobertaModel", RobertaConfig(**_ENCODER, type_vocab_size=1, layer_norm_eps=1e-5), (),
    ),
    "roberta_classifier": (
        "RobertaForSequenceClassification",
        RobertaConfig(**_ENCODER, type_vocab_size=1, num_labels=3),
        (*(f"roberta.{name}" for name in _OF_BERT), "classifier.dense.weight"),
    ),
}  # fmt: skip
# The same weights in many files.
SHARDED = {"llama_sharded": "llama"}


def make_folder(name: str, seed: int) -> None:
    class_name, config, _ = CASES[name]
    random_model(class_name, config, seed).save_pretrained(FAMILIES / name)
    print(f"{name}: drawn anew")


def check_the_settings_matter(name: str, arrays: dict[str, np.ndarray], inputs) -> None:
    """Exits unless the window and the scaled rotations change what they should change."""
    plain = {
        "mistral_window": lambda config: setattr(config, "sliding_window", None),
        "llama_rope_llama3": lambda config: _unscaled(config, 50.0),
        "llama_rope_linear": lambda config: _unscaled(config, 10000.0),
    }
    if name not in plain:
        return
    model = load_folder(FAMILIES / name)
    plain[name](model.config)
    other = type(model)._from_config(model.config, attn_implementation="eager").eval()
    other.load_state_dict(model.state_dict())
    change = np.abs(outputs(other, inputs)["logits"] - arrays["logits"]).max()
    print(f"{name}: without its setting logits would differ by {change:.2f}")
    if change < 0.1:
        sys.exit(f"{name} would not show whether its setting is heeded")


def _unscaled(config, theta: float) -> None:
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}


def main() -> None:
    check = is_check(__doc__)
    torch.set_num_threads(1)
    for seed, (name, (_, _, kernels)) in enumerate(CASES.items()):
        if not (FAMILIES / name).exists() and not check:
            make_folder(name, seed)
        model = load_folder(FAMILIES / name)
        inputs = make_inputs(model.config, seed=100 + seed)
        arrays = outputs(model, inputs, kernels)
        check_the_settings_matter(name, arrays, inputs)
        path = FAMILIES / f"{name}_states.safetensors"
        store(path, {**inputs, **arrays}, check=check, tolerance=1e-5)
    for name, whole in SHARDED.items():
        if not (FAMILIES / name).exists() and not check:
            load_folder(FAMILIES / whole).save_pretrained(FAMILIES / name, max_shard_size="8KB")
        theirs, ours = (load_folder(FAMILIES / n).state_dict() for n in (whole, name))
        if any(not torch.equal(theirs[k], ours[k]) for k in theirs.keys() | ours.keys()):
            shutil.rmtree(FAMILIES / name)
            sys.exit(f"{name} held other weights than {whole} and was removed; run this again")


if __name__ == "__main__":
    main()
