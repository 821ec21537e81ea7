"""Makes the fixtures of `test_peft_format.py` with peft, or checks them against it.

In an environment with torch (CPU), transformers, peft and safetensors:

    python tests/parity/make_peft_fixtures.py            # writes tests/fixtures/peft
    python tests/parity/make_peft_fixtures.py --check    # recomputes and compares, writes nothing

`bases/` holds one tiny random model a family, `adapters/` what peft saved for each case below, all
of its tensors random and none zero, and `expected.safetensors` the logits and the gradients of A
and B under peft. Base models and adapters are drawn once and kept: where a folder exists, only what
peft computes from it is renewed.
"""

import json

import numpy as np
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch_reference import FIXTURES, is_check, store
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
    RobertaConfig,
)

FOLDER = FIXTURES / "peft"
VOCAB = 48
_ENCODER = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 24, "num_labels": 3,
}  # fmt: skip
_LLAMA = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCAB, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LM, CLS, BARE = AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModel
BASES = {
    "llama": (LM, LlamaConfig(**_LLAMA, attention_bias=True, mlp_bias=True)),
    "llama_tied": (LM, LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
    "llama_cls": (CLS, LlamaConfig(**_LLAMA, num_labels=3)),
    "qwen2": (LM, Qwen2Config(**_LLAMA)),
    "gpt2": (LM, GPT2Config(**_GPT2)),
    "bert": (BARE, BertConfig(**_ENCODER)),
    "bert_cls": (CLS, BertConfig(**_ENCODER)),
    "roberta_cls": (CLS, RobertaConfig(**_ENCODER, pad_token_id=1)),
}
_PATTERNS = {
    "rank_pattern": {"q_proj": 2, r"layers.1.self_attn.q_proj": 3, "down_proj": 5},
    # Overlapping: the first that matches wins, and "q_proj" stands first.
    "alpha_pattern": {"q_proj": 6, "layers.1.self_attn.q_proj": 2, r"mlp.*": 3},
}
_SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "llama-list": ("llama", {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8}),
    "llama-regex": ("llama", {"target_modules": r".*layers\.1\.self_attn\.(q|o)_proj", "r": 3}),
    "llama-all-linear": ("llama", {"target_modules": "all-linear", "r": 2, "lora_alpha": 5}),
    "llama-patterns": ("llama", {"target_modules": _SEVEN, "r": 4, "lora_alpha": 4, **_PATTERNS}),
    "llama-rslora": (
        "llama",
        {"target_modules": ["q_proj", "down_proj"], "r": 4, "use_rslora": True,
         "rank_pattern": {"down_proj": 2}},
    ),
    "llama-dora": ("llama", {"target_modules": ["k_proj", "up_proj"], "r": 2, "use_dora": True}),
    "llama-dora-rslora": (
        "llama",
        {"target_modules": ["q_proj"], "r": 4, "use_dora": True, "use_rslora": True},
    ),
    "llama-layers": (
        "llama", {"target_modules": ["q_proj", "v_proj"], "r": 2, "layers_to_transform": [1]}
    ),
    "llama-layers-pattern": (
        "llama",
        {"target_modules": ["o_proj"], "r": 2, "layers_to_transform": 0,
         "layers_pattern": "layers"},
    ),
    "llama-exclude": (
        "llama",
        {"target_modules": ["q_proj", "v_proj"], "r": 2,
         "exclude_modules": r".*layers\.0.*v_proj"},
    ),
    "llama-bias-lora": ("llama", {"target_modules": ["q_proj"], "r": 2, "bias": "lora_only"}),
    "llama-bias-all": ("llama", {"target_modules": ["q_proj", "up_proj"], "r": 2, "bias": "all"}),
    "llama-save-head": (
        "llama", {"target_modules": ["q_proj"], "r": 2, "modules_to_save": ["lm_head", "norm"]}
    ),
    "llama-save-embedding": (
        "llama", {"target_modules": ["v_proj"], "r": 2, "modules_to_save": ["embed_tokens"]}
    ),
    "llama-embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 2}),
    "llama-embedding-dora": (
        "llama", {"target_modules": ["embed_tokens", "o_proj"], "r": 2, "use_dora": True}
    ),
    "llama-head": ("llama", {"target_modules": ["lm_head", "q_proj"], "r": 2}),
    "llama-tied-embedding": ("llama_tied", {"target_modules": ["embed_tokens", "q_proj"], "r": 2}),
    "llama-cls": ("llama_cls", {"target_modules": ["q_proj"], "r": 2}),
    "qwen2-list": ("qwen2", {"target_modules": ["k_proj", "gate_proj"], "r": 3, "bias": "all"}),
    "gpt2-c_attn": ("gpt2", {"target_modules": ["c_attn"], "r": 4, "lora_alpha": 32}),
    "gpt2-all-linear-dora": ("gpt2", {"target_modules": "all-linear", "r": 2, "use_dora": True}),
    "gpt2-bias-all": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "r": 2, "bias": "all"}),
    "gpt2-tied-embedding": ("gpt2", {"target_modules": ["wte", "c_attn"], "r": 2}),
    "gpt2-position": ("gpt2", {"target_modules": ["wpe", "c_fc"], "r": 2}),
    "bert-bare": ("bert", {"target_modules": ["query", "value"], "r": 2}),
    "bert-all-linear": ("bert", {"target_modules": "all-linear", "r": 2}),
    "bert-cls": ("bert_cls", {"target_modules": ["query", "value"], "r": 2}),
    "bert-cls-all": ("bert_cls", {"target_modules": "all-linear", "r": 2, "bias": "lora_only"}),
    "roberta-cls": (
        "roberta_cls", {"target_modules": ["query", "dense"], "r": 2, "use_rslora": True}
    ),
    "roberta-cls-dora": ("roberta_cls", {"target_modules": ["value"], "r": 2, "use_dora": True}),
}  # fmt: skip
TASKS = {LM: TaskType.CAUSAL_LM, CLS: TaskType.SEQ_CLS, BARE: TaskType.FEATURE_EXTRACTION}


def off_defaults(model, scale: float, seed: int) -> None:
    """Every parameter random: a zero or a one would hide what is swapped or left out."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        is_norm = parameter.ndim == 1 and name.endswith("weight")
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (1.0 if is_norm else 0.0) + scale * noise


def load_base(name: str):
    kind, _ = BASES[name]
    folder = FOLDER / "bases" / name
    return kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def make_adapter(case: str, folder) -> None:
    base, settings = CASES[case]
    model = get_peft_model(load_base(base), LoraConfig(**settings, task_type=TASKS[BASES[base][0]]))
    generator = torch.Generator().manual_seed(len(case))
    for parameter in model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + 0.2 * noise
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base
    if case == "llama-patterns":
        # As somebody's file may be: peft itself sorts keys when it saves, and so changes scales.
        config |= _PATTERNS
    path.write_text(json.dumps(config, indent=2) + "\n")


def inputs(base: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    batch, time = 4, 9
    ids = rng.integers(3, VOCAB, (batch, time))
    lengths, columns = np.array([9, 6, 9, 4]), np.arange(time)[None]
    # Classifiers of decoders find the last token by its id: padding on the right alone.
    left = columns >= time - lengths[:, None]
    right = columns < lengths[:, None]
    mask = np.where(np.arange(batch)[:, None] < 2, right, left if "cls" not in base else right)
    pad = 1 if base.startswith("roberta") else 0
    return {
        "input_ids": np.where(mask, ids, pad).astype(np.int32),
        "attention_mask": mask.astype(np.int32),
    }


def expected(case: str) -> dict[str, np.ndarray]:
    base, _ = CASES[case]
    model = PeftModel.from_pretrained(
        load_base(base), FOLDER / "adapters" / case, is_trainable=True
    ).eval()
    arrays = inputs(base)
    batch = {name: torch.from_numpy(array).long() for name, array in arrays.items()}
    output = model(**batch)
    output = output.logits if hasattr(output, "logits") else output.last_hidden_state
    real = torch.ones(output.shape[0]) if output.ndim == 2 else batch["attention_mask"].float()
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    (
        output * weights * real.reshape(*real.shape, *[1] * (output.ndim - real.ndim))
    ).sum().backward()
    with model.disable_adapter():
        plain = model(**batch)
        plain = plain.logits if hasattr(plain, "logits") else plain.last_hidden_state
    # Whole modules and biases are off, too; but an adapter of nothing would prove nothing.
    assert (plain - output).abs().max() > 0.1, case
    found = {"logits": output.detach().numpy(), "weights": weights.numpy()}
    for name, parameter in model.named_parameters():
        if "lora_" in name and parameter.grad is not None:
            key = name.replace(".default", "").removeprefix("base_model.model.")
            found[f"grad.{key}"] = parameter.grad.numpy()
    return {f"{case}/{name}": array for name, array in found.items()}


def main() -> None:
    check = is_check(__doc__)
    for number, (name, (kind, config)) in enumerate(BASES.items()):
        folder = FOLDER / "bases" / name
        if not folder.exists() and not check:
            model = kind.from_config(config)
            off_defaults(model, 0.25, seed=number)
            model.save_pretrained(folder)
            (folder / "generation_config.json").unlink(missing_ok=True)
    arrays = {}
    for case in CASES:
        folder = FOLDER / "adapters" / case
        if not folder.exists() and not check:
            make_adapter(case, folder)
        arrays |= expected(case)
    for base in BASES:
        arrays |= {f"{base}/{name}": array for name, array in inputs(base).items()}
    store(FOLDER / "expected.safetensors", arrays, check=check, tolerance=2e-5)


if __name__ == "__main__":
    main()
