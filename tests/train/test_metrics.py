import errno
import json

import pytest

import lora_jax.train.metrics as metrics_module
from lora_jax.core.errors import RequestError
from lora_jax.train.metrics import MetricsWriter, read_metrics


def write_steps(folder, steps, *, num_lines=0, step=0):
    with MetricsWriter(folder, num_lines=num_lines, step=step) as metrics:
        for number in steps:
            metrics.write(step=number, split="train", loss=1.0 / number)
            metrics.write(step=number, split="validation", loss=2.0 / number, accuracy=0.5)


def test_resumed_file_equals_an_uninterrupted_one(tmp_path):
    write_steps(tmp_path / "whole", range(1, 7))
    # The checkpoint was taken after step 3: six lines. Three more steps were lost with the process.
    write_steps(tmp_path / "cut", range(1, 6))
    write_steps(tmp_path / "cut", range(4, 7), num_lines=6, step=3)
    whole, cut = (tmp_path / name / "metrics.jsonl" for name in ("whole", "cut"))
    assert cut.read_bytes() == whole.read_bytes()


def test_torn_last_line_is_no_line(tmp_path):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for length in range(len(lines[-1])):
        path.write_bytes(b"".join(lines[:-1]) + lines[-1][:length])
        assert read_metrics(path) == [json.loads(line) for line in lines[:-1]]


def test_damaged_middle_line_is_named(tmp_path):
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"step": 2', b'"step" 2', 1))
    with pytest.raises(RequestError, match=r"metrics\.jsonl:3"):
        read_metrics(path)


def test_full_disk_is_a_request_error_and_keeps_the_lines_before(tmp_path, monkeypatch):
    write_steps(tmp_path, range(1, 4))
    before = (tmp_path / "metrics.jsonl").read_bytes()
    full = open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(metrics_module, "open", lambda *_, **__: full, raising=False)
    with pytest.raises(RequestError, match="metrics.jsonl: No space left") as caught:
        write_steps(tmp_path, range(4, 6), num_lines=6, step=3)
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
