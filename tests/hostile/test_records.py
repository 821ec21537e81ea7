"""What the fuzzer found, one of each kind: records of strangers are one line or read."""

from __future__ import annotations

import copy
import io
import json
import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lora_jax.cli import generate
from lora_jax.cli.main import main
from lora_jax.core.errors import RequestError
from lora_jax.core.rules import Rule
from lora_jax.generate.text import encode_prompts
from lora_jax.io.safetensors import read_tensors, write_tensors
from lora_jax.io.untrusted import DEEPEST, check_fields, parse_json, read_arrays
from lora_jax.models import load_model
from lora_jax.report.export import keep_runs
from lora_jax.settings import config_hash
from lora_jax.sweeps.record import read_record
from lora_jax.sweeps.verify import verify
from lora_jax.train import evaluate_run as again
from lora_jax.train.adapted import _check_against_card
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.record import Card
from lora_jax.train.workdir import check_cell, check_inside, config_from
from lora_jax.train.write_results import hash_trainable
from tests.cards import card_json

CARD = card_json({"program.K": 2, "program.cells": ["a", "b"], "program.at_once": 0})


def changed(name, value):
    """CARD with another value at a dotted name."""
    return card_json({name: value}, **copy.deepcopy(CARD))


NO_JSON = ["[" * (DEEPEST + 2) + "]" * (DEEPEST + 2), '"\\ud800"', '{"\\udfff": 1}']


@pytest.mark.parametrize("text", NO_JSON)
def test_json_that_nothing_can_walk_or_print_is_no_json(text):
    for given in (text, text.encode()):
        with pytest.raises(ValueError):
            parse_json(given)


def test_whole_pairs_and_the_allowed_depth_are_json():
    assert parse_json('"\\ud83d\\ude00"') == "\U0001f600"
    assert parse_json("[" * DEEPEST + "]" * DEEPEST)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("metrics", [[1]]), ("metrics.test", None), ("metrics.test.loss", "x"),
        ("metrics.test.loss", 10**400), ("metrics.steps", -1), ("metrics.steps", 2**63),
        ("counts.adapter", True), ("config", []), ("base_hash", 3), ("versions", {"jax": 1}),
        ("config.method", {}), ("config.seed", "one"), ("config.data.seed", 2**64),
        ("config.optimizer.lr", "fast"), ("seconds", []), ("program.K", 0.5), ("device", None),
        ("program.ranks", [[1]]), ("config_file", 3), ("metrics.test.loss", None),
    ],
)  # fmt: skip
def test_a_field_of_another_kind_is_named_with_its_file(tmp_path, name, value):
    path = tmp_path / "card.json"
    path.write_text(json.dumps(CARD))
    assert Card.read(path).to_json() == CARD
    path.write_text(json.dumps(changed(name, value)))
    with pytest.raises(RequestError, match=f"card.json: {name}.* restore it") as caught:
        Card.read(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("value", [{}, [["a"]], ["../../outside"], ["a", "b\0"], "ab"])
def test_verify_trains_no_cells_outside_the_workdir(tmp_path, value):
    (tmp_path / "card.json").write_text(json.dumps(changed("program.cells", value)))
    with pytest.raises(RequestError, match="cells|a cell"):
        verify(tmp_path)


@pytest.mark.parametrize(
    "told",
    [[], {"sweeps": []}, {"sweeps": "x", "cells": [], "refused": {}, "num_steps": {}},
     {"sweeps": ["[red]"], "cells": [], "refused": {}, "num_steps": {}},
     {"sweeps": [], "cells": [["a"]], "refused": {}, "num_steps": {}},
     {"sweeps": [], "cells": ["../x"], "refused": {}, "num_steps": {}}],
)  # fmt: skip
def test_a_sweeps_record_is_read_whole_or_refused(tmp_path, told):
    (tmp_path / "sweep.json").write_text(json.dumps(told))
    with pytest.raises(RequestError, match=r"sweep\.json.*restore that file"):
        read_record(tmp_path)


def test_tensors_of_65_axes_are_a_request_error(tmp_path):
    path = tmp_path / "a.safetensors"
    write_tensors(path, {"x": np.ones(4, np.float32)})
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header["x"]["shape"] = [1] * 65 + [4]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    with pytest.raises(RequestError, match=r"a\.safetensors"):
        read_tensors(path)


def test_predictions_are_a_regular_file_and_no_bomb(tmp_path):
    path = tmp_path / "p.npz"
    np.savez_compressed(path, x=np.arange(4))
    np.testing.assert_array_equal(read_arrays(path)["x"], np.arange(4))
    damaged = bytearray(path.read_bytes())
    damaged[60] ^= 255
    path.write_bytes(bytes(damaged))
    with pytest.raises(ValueError):
        read_arrays(path)
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", b"")
    body = whole.getvalue()
    central = body.index(b"PK\1\2")
    path.write_bytes(
        body[: central + 24] + (2**31 + 1).to_bytes(4, "little") + body[central + 28 :]
    )
    with pytest.raises(ValueError, match="unpacks to"):
        read_arrays(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="no regular file"):
        read_arrays(path)


def test_a_description_that_is_not_its_cards_is_refused(tmp_path):
    weights = {"w": {"a": np.ones((2, 2), np.float32)}}
    folder = tmp_path / "adapter"
    folder.mkdir()
    card = changed("metrics.weights_sha256", hash_trainable(weights))
    (tmp_path / "card.json").write_text(json.dumps(card))
    said = {**CARD["config"], "base_hash": "b" * 64, "data_hash": "d" * 64}
    _check_against_card(folder, weights, said)
    for name, value in (("seed", 1), ("data_hash", 2**63), ("method", {"name": "dora"})):
        with pytest.raises(RequestError, match=f"different {name}"):
            _check_against_card(folder, weights, {**said, name: value})


def test_evaluating_needs_the_config_that_the_card_names(tmp_path):
    config = {
        **CARD["config"],
        "data": {"buckets": [8]},
        "train": {"eval_batch_size": 4},
    }
    card = {**CARD, "config": config, "config_hash": config_hash(config)}
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert again.config_of(tmp_path) == config
    (tmp_path / "config.json").write_text(json.dumps({**config, "data": {"buckets": {"0": 0}}}))
    with pytest.raises(RequestError, match="does not have the hash"):
        again.config_of(tmp_path)
    with pytest.raises(RequestError, match="holds no config"):
        config_from({"../x": 1}, tmp_path)


def test_damaged_metadata_of_checkpoints_are_one_line(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"state": {"w": np.ones(2, np.float32)}}, {})
    for path in tmp_path.rglob("_CHECKPOINT_METADATA"):
        path.write_text("[" * 100_000)
    with pytest.raises(RequestError, match="remove"):
        Checkpoints(tmp_path)


def test_a_link_to_itself_is_outside_the_workdir(tmp_path):
    cell = tmp_path / "cells" / "one"
    cell.mkdir(parents=True)
    (cell / "adapter").symlink_to(cell / "adapter")
    with pytest.raises(RequestError, match="outside the workdir"):
        check_inside(cell)


def test_keeping_runs_follows_no_link(tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("secret")
    cell = tmp_path / "w" / "cells" / "one"
    cell.mkdir(parents=True)
    (cell / "card.json").write_text(json.dumps(CARD))
    (cell / "metrics.jsonl").symlink_to(tmp_path / "secret")
    run = SimpleNamespace(finished=True, name="one", folder=cell)
    monkeypatch.setattr("lora_jax.report.export.read_runs", lambda workdir: [run])
    with pytest.raises(RequestError, match="is a link"):
        keep_runs(tmp_path / "w", tmp_path / "kept")
    assert not (tmp_path / "kept" / "cells" / "one").exists()


@pytest.mark.parametrize(
    "argv",
    [["evaluate", "x" * 300], ["report", "a/" + "x" * 300], ["cite", "a\0b"],
     ["inspect", "\x1b[31mred\x1b[0m"], ["merge", "two\nlines", "--out=m"]],
)  # fmt: skip
def test_names_of_any_kind_are_one_printable_line(argv, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.rstrip("\n").isprintable()


def test_a_cells_config_that_is_no_object_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("-1")
    with pytest.raises(RequestError, match=r"config\.json holds no JSON object"):
        check_cell(tmp_path, {"seed": 0})


def test_a_setting_of_another_kind_has_its_nearest_names():
    with pytest.raises(RequestError, match="init is"):
        Rule("q", init=["kaiming_uniform"])


@pytest.mark.parametrize("head", ["classification", None])
def test_generating_with_a_run_of_another_task_says_so(tmp_path, monkeypatch, head):
    kind = "causal-lm" if head else "encoder"
    adapted = SimpleNamespace(model=SimpleNamespace(head=head, kind=kind), description={})
    monkeypatch.setattr("lora_jax.load_adapter", lambda path, model: adapted)
    monkeypatch.setattr("lora_jax.serve.adapters.run_adapter", Path)
    with pytest.raises(RequestError, match="not for language"):
        generate._load(str(tmp_path))


@pytest.mark.parametrize("marker", [{}, {"completions": 2}])
def test_generating_checks_the_format_of_completions_as_evaluating_does(
    tmp_path, monkeypatch, marker
):
    adapted = SimpleNamespace(
        model=SimpleNamespace(head=None, kind="causal-lm"),
        description={"model": {"name": "m"}, **marker},
    )
    monkeypatch.setattr("lora_jax.load_adapter", lambda path, model: adapted)
    monkeypatch.setattr("lora_jax.serve.adapters.run_adapter", Path)
    monkeypatch.setattr(again, "completion_format", lambda model, settings: {"completions": 2})
    if marker:
        assert generate._load(str(tmp_path)) is adapted
        return
    with pytest.raises(RequestError, match="earlier version"):
        generate._load(str(tmp_path))


def test_an_optional_field_may_be_missing_and_is_checked_where_it_is():
    check_fields({"a": 1}, {"?b": str}, "f", "")
    with pytest.raises(RequestError, match="f: b is 1"):
        check_fields({"b": 1}, {"?b": str}, "f", "")


def test_a_tokenizer_that_contradicts_itself_is_named_when_it_encodes():
    """The library panics then, which is no `Exception`: seed 215 of the fuzzer's "model"."""

    def encode_batch(prompts):
        panic = type("PanicException", (BaseException,), {})
        raise panic("no entry found for key")

    model = SimpleNamespace(tokenizer=SimpleNamespace(encode_batch=encode_batch), pad_token_id=0)
    with pytest.raises(RequestError, match=r"no entry found for key; restore .*tokenizer\.json"):
        encode_prompts(model, ["a"])


def test_more_labels_than_any_head_has_are_refused():
    with pytest.raises(RequestError, match="must be at most"):
        load_model("tiny-bert", head="classification", num_labels=10**300)
