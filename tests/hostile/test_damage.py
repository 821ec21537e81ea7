"""Damaged files: one line that names the file, or the training goes on; never a traceback."""

import json
import os

import numpy as np
import pytest

from lora_jax.core.errors import RequestError
from lora_jax.io.safetensors import write_tensors
from lora_jax.io.untrusted import parse_json, read_regular
from lora_jax.models import tokenizer as tokenizers_here
from lora_jax.sweeps.status import sweep_status
from lora_jax.train.adapted import _check_against_card
from lora_jax.train.metrics import MetricsWriter, read_metrics
from lora_jax.train.write_results import hash_trainable
from tests.cards import card_json


def test_deeply_nested_json_is_a_value_error():
    with pytest.raises(ValueError, match="nested too deep"):
        parse_json("[" * 100_000)


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="no regular file"):
        read_regular(tmp_path / "metrics.jsonl")
    with pytest.raises(RequestError, match="no regular file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_panic_of_the_tokenizers_library_is_a_request_error(tmp_path, monkeypatch):
    PanicException = type("PanicException", (BaseException,), {})

    def panics(path):
        raise PanicException("no entry found for key")

    fake = type("Tokenizer", (), {"from_file": staticmethod(panics)})
    monkeypatch.setattr("tokenizers.Tokenizer", fake)
    with pytest.raises(RequestError, match="not a readable tokenizer"):
        tokenizers_here.read_tokenizer(tmp_path / "t.json", vocab_size=3, pad_token_id=0)


def lines(tmp_path, edit, capsys):
    path = tmp_path / "metrics.jsonl"
    rows = [json.dumps({"step": n, "split": "train", "loss": 1.0}) for n in range(1, 6)]
    path.write_text("".join(row + "\n" for row in edit(rows)))
    with MetricsWriter(tmp_path, num_lines=4, step=4) as writer:
        writer.write(step=5, split="train", loss=0.5)
        assert writer.num_lines == len(read_metrics(path))
    return [(row["step"], row["loss"]) for row in read_metrics(path)], capsys.readouterr().err


@pytest.mark.parametrize("edit", [lambda r: [r[0], "{da\0", *r[2:]], lambda r: [r[0], *r[2:]]])
def test_a_damaged_or_missing_line_of_the_log_does_not_stop_a_training(tmp_path, edit, capsys):
    found, told = lines(tmp_path, edit, capsys)
    assert found == [(1, 1.0), (3, 1.0), (4, 1.0), (5, 0.5)]
    assert "1 of 4 lines are missing or damaged" in told


def test_an_undamaged_log_is_cut_at_the_checkpoint_without_a_word(tmp_path, capsys):
    found, told = lines(tmp_path, lambda rows: rows, capsys)
    assert found == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 0.5)] and told == ""


def test_one_flipped_bit_of_an_adapter_is_found_by_the_card_next_to_it(tmp_path):
    weights = {"w": {"a": np.ones((4, 2), np.float32)}}
    folder = tmp_path / "adapter"
    folder.mkdir()
    write_tensors(folder / "trainable.safetensors", {"w:a": weights["w"]["a"]})
    card = card_json({"metrics.weights_sha256": hash_trainable(weights)})
    (tmp_path / "card.json").write_text(json.dumps(card))
    said = {**card["config"], "base_hash": card["base_hash"], "data_hash": card["data_hash"]}
    _check_against_card(folder, weights, said)
    weights["w"]["a"].view(np.uint32)[1, 1] ^= 1
    with pytest.raises(RequestError, match="weights_sha256"):
        _check_against_card(folder, weights, said)


@pytest.mark.parametrize(
    "told",
    [
        [], 3, {"cells": 3}, {"cells": ["../x"], "num_steps": {}, "refused": {}},
        {"cells": ["a"], "num_steps": {"a": "x"}, "refused": {}},
        {"cells": ["a"], "num_steps": [], "refused": {}}, {"cells": [["a"]]},
    ],
)  # fmt: skip
def test_a_malformed_sweep_is_one_line(tmp_path, told):
    (tmp_path / "sweep.json").write_text(json.dumps(told))
    with pytest.raises(RequestError) as caught:
        sweep_status(tmp_path)
    assert "\n" not in str(caught.value)
