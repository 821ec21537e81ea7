"""A tiny task on disk, and configs for it made from the main experiment's own."""

import importlib.util
import json
import random
from pathlib import Path

import pytest

from lora_jax.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
GOOD = ["good", "great", "fine", "best", "lovely", "brilliant", "moving", "funny"]
BAD = ["bad", "awful", "poor", "worst", "dull", "boring", "weak", "stupid"]
OTHER = ["the", "film", "is", "a", "story", "with", "an", "actor", "and", "music", "in", "it"]


@pytest.fixture(scope="session")
def reviews_file(tmp_path_factory):
    """120 sentences whose class hangs on one word, as jsonl."""
    generator = random.Random(0)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(120):
            label = number % 2
            words = [generator.choice(OTHER) for _ in range(generator.randint(2, 8))]
            words += [generator.choice(GOOD if label else BAD), str(number)]
            generator.shuffle(words)
            file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return path


def load_experiment(file):
    """The module of `experiments/file`, as the command line loads it: from its path."""
    spec = importlib.util.spec_from_file_location(Path(file).stem, ROOT / "experiments" / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def make_config(reviews_file):
    """`make_config({"method.name": "full"})`: 12 steps of tiny-bert, dropout on, one shape."""
    module = load_experiment("reviews_minilm.py")

    def make(changes=None):
        config = module.get_config("lora,smoke")
        settings = {
            "data.source": "jsonl",
            "data.path": str(reviews_file),
            "data.limit": 0,
            "data.batch_size": 8,
            "data.max_length": 16,
            "method.dropout": 0.2,
            "optimizer.lr": 3e-3,
            "train.num_steps": 12,
            "train.eval_every_steps": 4,
            "train.log_every_steps": 3,
            "train.eval_batch_size": 12,
        }
        return Settings.from_config(config).replace(settings | (changes or {}))

    return make
