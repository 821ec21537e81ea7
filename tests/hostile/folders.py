"""Small real folders to damage: runs, a packed sweep, a PEFT adapter with its base, a config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from lora_jax.cli.main import main
from lora_jax.settings.config import find_config

ROOT = Path(__file__).resolve().parents[2]
SOURCE = find_config("reviews_minilm")
FIXTURES = ROOT / "tests" / "fixtures"
SWEEP = (
    '\n\ndef sweep_two(add):\n    for r in (1, 2):\n        add(f"r{r}", **{"method.rank": r})\n'
)
LEFT_BY_THE_END = ("card.json", "test_predictions.npz", "adapter")


def run(*argv: str) -> None:
    """A command that must succeed."""
    assert main(list(argv)) == 0, argv


def settings(home: Path, changes: str = "") -> list[str]:
    """`--config…` of four steps of tiny-bert on texts in `home`."""
    overrides = {"source": "jsonl", "path": home / "texts.jsonl", "batch_size": 8, "max_length": 16}
    given = [f"--config.data.{key}={value}" for key, value in overrides.items()]
    return [f"--config={home}/config.py:lora,smoke", *given, "--config.train.eval_batch_size=16",
            *changes.split()]  # fmt: skip


def unfinished(finished: Path, folder: Path) -> None:
    """A copy of a workdir as it was when the last checkpoint had been written, and no card."""
    shutil.copytree(finished, folder)
    for cell in (folder / "cells").iterdir():
        for name in LEFT_BY_THE_END:
            path = cell / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def make_folders(home: Path) -> None:
    """`home` with config.py, texts.jsonl and the workdirs and folders that the fuzzer damages."""
    rows = [
        {"text": f"{word} film {n}", "label": word} for n in range(24) for word in ("yes", "no")
    ]
    (home / "texts.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (home / "config.py").write_text(SOURCE.read_text(encoding="utf-8") + SWEEP)
    run("train", *settings(home), f"--workdir={home}/run", "--no-progress")
    run("sweep", *settings(home), "--sweep=two", f"--workdir={home}/sweep", "--no-progress")
    unfinished(home / "run", home / "begun")
    unfinished(home / "sweep", home / "begun_sweep")
    talk = ["--config=e2e_smollm2:smoke", "--config.train.num_steps=2"]
    run("train", *talk, f"--workdir={home}/pairs", "--no-progress")
    copy_models(home)


def copy_models(home: Path) -> None:
    """The folders that nothing is trained for."""
    shutil.copytree(FIXTURES / "bert_tiny", home / "encoder")
    shutil.copytree(FIXTURES / "families" / "llama", home / "model")
    shutil.copytree(FIXTURES / "peft" / "adapters" / "llama-patterns", home / "peft")
    shutil.copytree(FIXTURES / "peft" / "bases" / "llama", home / "base")
    for folder in ("model", "base"):
        (home / folder / "tokenizer.json").write_text(small_tokenizer().to_str())


def small_tokenizer() -> tokenizers.Tokenizer:
    """Forty words, with a normalizer, a decoder, added tokens and BOS, as real files have them."""
    words = {word: n for n, word in enumerate(["<s>", "</s>", "the", "film", *"abcdefghijklmnop"])}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer
