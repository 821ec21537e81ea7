"""Makes the fixtures of `test_generate_parity.py` with transformers, or checks them against it.

In an environment with torch (CPU), transformers 5 and safetensors:

    python tests/parity/make_generate_fixtures.py            # writes tests/fixtures/generate*
    python tests/parity/make_generate_fixtures.py --check    # recomputes and compares

A tiny Llama with grouped queries and a tiny GPT-2, their weights drawn once and kept, continue the
prompts in each way of `generate_cases.py`. A case stands only if neither float64 nor noise of
1e-5 on the logits changes one token: no tie is left to rounding. Each way must matter: a text ends
early where there are ends, and a rule against repeats changes what is found without it.
"""

import sys

import numpy as np
import torch
from generate_cases import CASES, EOS, MODELS, NUM_NEW, PAD
from torch_reference import FIXTURES, is_check, store
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
)

FOLDER = FIXTURES / "generate"
VOCAB = 97
NOISE = 1e-5


def make_model(name: str) -> torch.nn.Module:
    shared = {"vocab_size": VOCAB, "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD}
    if name == "llama":
        config = LlamaConfig(
            **shared, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    else:
        config = GPT2Config(**shared, n_embd=32, n_layer=2, n_head=4, n_positions=32)
        model = GPT2LMHeadModel(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and key.endswith("weight")
            std = 0.15 if is_norm else 0.1 if parameter.ndim == 1 else 0.3
            parameter.copy_((1.0 if is_norm else 0.0) + std * torch.randn_like(parameter))
    return model


class Noise(LogitsProcessor):
    def __init__(self):
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, input_ids, scores):
        noise = 2 * torch.rand(scores.shape, generator=self.generator) - 1
        return scores + NOISE * noise.to(scores.dtype)


def prompts() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    # A few tokens that the models like to come back to, so that there is something to repeat.
    liked = np.array([8, 14, 16, 23, 31, 36, 67, 70, 84, 92])
    ids = rng.choice(liked, (6, 9)).astype(np.int32)
    lengths = np.array([9, 4, 7, 1, 9, 6])
    mask = (np.arange(9)[None] >= 9 - lengths[:, None]).astype(np.int32)
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, name: str, case: dict, *, noise: bool = False) -> np.ndarray:
    """(rows, NUM_NEW) int32: new tokens, `PAD` after the end."""
    inputs = prompts()
    if case["prompts"] == "full":
        inputs["attention_mask"] = np.ones_like(inputs["attention_mask"])
    ids = np.where(inputs["attention_mask"] == 1, inputs["input_ids"], PAD)
    settings = {key: value for key, value in case.items() if key not in ("prompts", "eos")}
    if "num_return" in settings:
        settings["num_return_sequences"] = settings.pop("num_return")
    eos = list(EOS[name][case["eos"]]) if "eos" in case else None
    with torch.no_grad():
        found = model.generate(
            torch.from_numpy(ids).long(),
            attention_mask=torch.from_numpy(inputs["attention_mask"]).long(),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            pad_token_id=PAD,
            eos_token_id=eos,
            logits_processor=[Noise()] if noise else [],
            **settings,
        )
    new = found[:, ids.shape[1] :].numpy()
    return np.pad(new, ((0, 0), (0, NUM_NEW - new.shape[1])), constant_values=PAD).astype(np.int32)


def all_generated(name: str, matters: set[str]) -> dict[str, np.ndarray]:
    """`{"model, case": tokens}`; adds to `matters` where a rule against repeats changed them."""
    folder = FOLDER / name
    model, wide = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        for dtype in (torch.float32, torch.float64)
    )
    arrays = {}
    for label, case in CASES.items():
        tokens = generated(model, name, case)
        for other in (generated(wide, name, case), generated(model, name, case, noise=True)):
            if not np.array_equal(tokens, other):
                sys.exit(f"{name}, {label!r}: a choice hangs on rounding; draw other prompts")
        # With a large penalty the longest text wins wherever it can.
        if "eos" in case and case.get("length_penalty", 1.0) <= 1.0:
            ends = np.isin(tokens, EOS[name][case["eos"]]).any(1)
            if not ends.any():
                sys.exit(f"{name}, {label!r}: no text ends early")
        if "no_repeat_ngram_size" in case:
            without = {k: v for k, v in case.items() if k != "no_repeat_ngram_size"}
            if not np.array_equal(tokens, generated(model, name, without)):
                matters.add(label)
        arrays[f"{name}, {label}"] = tokens
    return arrays


def main() -> None:
    check = is_check(__doc__)
    torch.set_num_threads(1)
    for name in MODELS:
        if not (FOLDER / name).exists() and not check:
            make_model(name).save_pretrained(FOLDER / name)
    arrays, matters = prompts(), set()
    for name in MODELS:
        arrays |= all_generated(name, matters)
    if idle := {n for n, case in CASES.items() if "no_repeat_ngram_size" in case} - matters:
        sys.exit(f"the rule against repeats changes nothing in {sorted(idle)}")
    store(FOLDER / "generated.safetensors", arrays, check=check, tolerance=0)
    distinct = len({array.tobytes() for array in arrays.values()})
    print(f"{len(arrays) - 2} cases, {distinct - 2} different answers")


if __name__ == "__main__":
    main()
