"""The other implementation: transformers' BERT under mean pooling and a linear head, in torch."""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from transformers import BertModel

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
TINY = FIXTURES / "bert_tiny"


class MeanPooledClassifier(torch.nn.Module):
    """`head(mean of the last hidden state over the attended positions)`."""

    def __init__(self, encoder: BertModel, num_labels: int):
        super().__init__()
        self.encoder = encoder
        self.head = torch.nn.Linear(encoder.config.hidden_size, num_labels)

    def forward(self, input_ids, attention_mask):
        h = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(h.dtype)
        return self.head((h * mask).sum(1) / mask.sum(1).clamp(min=1e-9))


def load_tiny() -> MeanPooledClassifier:
    """The committed tiny model with its head, in float32, dropout off."""
    encoder = BertModel.from_pretrained(
        TINY, add_pooling_layer=False, attn_implementation="eager", dtype=torch.float32
    )
    head = load_file(TINY / "head.safetensors")
    model = MeanPooledClassifier(encoder, num_labels=len(head["head.bias"]))
    model.head.weight.data = torch.from_numpy(head["head.weight"])
    model.head.bias.data = torch.from_numpy(head["head.bias"])
    return model.eval()


def is_check(doc: str, arguments: list[str] | None = None) -> bool:
    """Parses the one option of the fixture scripts."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    return parser.parse_args(arguments).check


def store(path: Path, arrays: dict[str, np.ndarray], *, check: bool, tolerance: float) -> None:
    """Writes the fixture, or with `check` exits with 1 unless the stored one agrees."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    if not check:
        save_file(arrays, path, metadata={"format": "pt"})
        print(f"{path.relative_to(FIXTURES)}: {path.stat().st_size / 1024:.0f} KB written")
        return
    stored = load_file(path)
    if stored.keys() != arrays.keys():
        sys.exit(f"{path}: names differ: {sorted(stored.keys() ^ arrays.keys())}")
    worst = max(
        float(np.abs(stored[n].astype(np.float64) - arrays[n].astype(np.float64)).max())
        for n in arrays
    )
    print(f"{path.relative_to(FIXTURES)}: largest difference {worst:.1e} (at most {tolerance:.0e})")
    if not worst <= tolerance:
        sys.exit(1)
