"""A tiny task on disk, and configs for it made from the main experiment's own."""

import json
import random
from pathlib import Path

import pytest

from lora_jax.settings import Settings
from lora_jax.settings.config import run_file

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


@pytest.fixture(scope="session")
def make_config(reviews_file):
    """`make_config({"method.name": "full"})`: 12 steps of tiny-bert, dropout on, one shape."""
    get_config = run_file("reviews_minilm")["get_config"]

    def make(changes=None):
        config = get_config("lora,smoke")
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
