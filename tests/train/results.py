"""What two runs must have in common, however they were interrupted."""

import hashlib
import json

import numpy as np

TIMES = ("seconds", "examples_per_s", "tokens_per_s")


def results_of(cell):
    """Everything a run leaves that does not tell the time, by name."""
    card = json.loads((cell / "card.json").read_text())
    lines = (cell / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]
    with np.load(cell / "test_predictions.npz") as arrays:
        predictions = {name: (array.dtype.str, array.tobytes()) for name, array in arrays.items()}
    return {
        "card": {key: card[key] for key in ("config_hash", "counts", "metrics", "seeds")},
        "rows": rows,
        "predictions": predictions,
        "weights": digest(cell / "adapter" / "trainable.safetensors"),
        "steps": sorted(path.name for path in (cell / "checkpoints").iterdir()),
    }


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
