"""The other implementation of every family: transformers', on random weights and odd padding."""

import json
from pathlib import Path

import numpy as np
import torch
import transformers

transformers.utils.logging.disable_progress_bar()

VOCAB, TIME = 64, 13
# Columns that hold no padding: right and left padding, rows of many lengths, a hole.
ROWS = (range(13), range(8), range(3), range(3, 13), range(8, 13), (0, 1, 2, 5, 6, 7, 8, 9))


def random_model(class_name: str, config, seed: int) -> torch.nn.Module:
    """A model with every weight off its default, so that a swap of two of them would be seen."""
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_norm = parameter.ndim == 1 and name.endswith("weight")
            # Kernels that neither shrink nor blow up what they are given, at any width.
            std = 0.2 if parameter.ndim == 1 else 1.2 / parameter.shape[1] ** 0.5
            parameter.copy_(is_norm + std * torch.randn_like(parameter))
    return model


def load_folder(folder: Path) -> torch.nn.Module:
    """The folder's own class in float32, eager attention, dropout off."""
    config = json.loads((folder / "config.json").read_text())
    cls = getattr(transformers, config["architectures"][0])
    return cls.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def make_inputs(config, seed: int, rows=ROWS, time: int = TIME) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    pad = config.pad_token_id or 0
    mask = np.zeros((len(rows), time), np.int32)
    for row, columns in enumerate(rows):
        mask[row, list(columns)] = 1
    # Never the padding's own id: RoBERTa and the classifiers look for it.
    ids = rng.integers(max(3, pad + 1), config.vocab_size, mask.shape)
    return {
        "input_ids": np.where(mask == 1, ids, pad).astype(np.int32),
        "attention_mask": mask,
    }


def outputs(
    model, inputs: dict[str, np.ndarray], kernels: tuple[str, ...] = ()
) -> dict[str, np.ndarray]:
    """`logits`, `states` and `pooled`, as far as the model has them, at the real positions.

    `kernels` names parameters whose gradients of `(logits * cos(1.7 n)).sum() / sqrt(N)` are given
    as `gradient.NAME`, where n counts the N logits that are compared.
    """
    real = torch.from_numpy(inputs["attention_mask"] == 1)
    tensors = {name: torch.from_numpy(x).long() for name, x in inputs.items()}
    found = model(**tensors, output_hidden_states=True)
    arrays = {"states": torch.stack(found.hidden_states)[:, real].detach().numpy()}
    if found.get("pooler_output") is not None:
        arrays["pooled"] = found.pooler_output.detach().numpy()
    if found.get("logits") is not None:
        logits = found.logits[real] if found.logits.ndim == 3 else found.logits
        arrays["logits"] = logits.detach().numpy()
        if kernels:
            wave = torch.cos(1.7 * torch.arange(logits.numel(), dtype=torch.float64)).float()
            model.zero_grad()
            ((logits.reshape(-1) * wave).sum() / logits.numel() ** 0.5).backward()
            named = dict(model.named_parameters())
            arrays |= {f"gradient.{name}": named[name].grad.numpy() for name in kernels}
    return arrays
