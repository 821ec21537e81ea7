"""Makes the fixture of `test_peft_training.py`: 100 steps of LoRA by peft and torch, in float32.

In an environment with torch (CPU), transformers, peft and safetensors, after
`make_bert_fixtures.py`, whose tiny model it trains:

    python tests/parity/make_peft_training_fixture.py            # writes the fixture
    python tests/parity/make_peft_training_fixture.py --check    # trains again and compares

The task has something to learn: the label is which third of the vocabulary most words are from.
"""

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch_reference import FIXTURES, is_check, load_tiny, store

STEPS, BATCH, TIME, LABELS = 100, 8, 12, 3
RANK, ALPHA = 4, 8
ADAMW = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def make_batches() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    shape = (STEPS, BATCH, TIME)
    labels = rng.integers(0, LABELS, shape[:2])
    first, width = 5, (100 - 5) // LABELS
    # Half of the words are from the label's third, the others from anywhere.
    own = first + labels[..., None] * width + rng.integers(0, width, shape)
    words = np.where(rng.random(shape) < 0.5, own, rng.integers(first, 100, shape))
    lengths = rng.integers(4, TIME + 1, shape[:2])
    mask = np.arange(TIME) < lengths[..., None]
    return {
        "input_ids": np.where(mask, words, 0).astype(np.uint8),
        "attention_mask": mask.astype(np.uint8),
        "labels": labels.astype(np.uint8),
    }


def train(batches: dict[str, np.ndarray], dtype=torch.float32) -> dict[str, np.ndarray]:
    """Returns adapters and head at the start and at the end, and the loss before each step."""
    torch.manual_seed(3)
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=["query", "value"],
        modules_to_save=["head"],
        lora_dropout=0.0,
        bias="none",
    )
    # `eval()` keeps the model's own dropout off; LoRA's is zero.
    model = get_peft_model(load_tiny(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                # From zero, A would have no gradient at the first step: test the whole path.
                parameter.copy_(0.05 * torch.randn_like(parameter))
    model = model.to(dtype)
    trainable = {n: p for n, p in model.named_parameters() if p.requires_grad}
    initial = {_short(n): p.detach().float().numpy().copy() for n, p in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), **ADAMW)
    losses = []
    for step in range(STEPS):
        ids, mask, labels = (torch.from_numpy(batches[k][step]).long() for k in batches)
        loss = torch.nn.functional.cross_entropy(model(ids, mask), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    final = {_short(n): p.detach().float().numpy() for n, p in trainable.items()}
    return {
        "losses": np.array(losses, np.float32),
        **{f"initial.{n}": x for n, x in initial.items()},
        **{f"final.{n}": x for n, x in final.items()},
    }


def _short(name: str) -> str:
    """Drops what peft wraps around a name: "encoder.….query.lora_A.weight", "head.weight"."""
    for wrapping in ("base_model.model.", ".default", ".modules_to_save"):
        name = name.replace(wrapping, "")
    return name.removeprefix("encoder.")


def main() -> None:
    check = is_check(__doc__)
    torch.set_num_threads(1)
    batches = make_batches()
    run = train(batches)
    wide = train(batches, torch.float64)
    gap = np.abs(run["losses"] - wide["losses"]).max()
    print(
        f"loss {run['losses'][:10].mean():.3f} -> {run['losses'][-10:].mean():.3f} (tens of steps)"
    )
    print(f"float32 and float64 runs of torch differ by {gap:.1e} in loss")
    path = FIXTURES / "peft_training.safetensors"
    store(path, {**batches, **run}, check=check, tolerance=1e-4)


if __name__ == "__main__":
    main()
