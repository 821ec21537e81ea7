import json
import os
import socket
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from lora_jax.core.errors import RequestError
from lora_jax.settings import config_hash, plain_config
from lora_jax.train.workdir import claim_cell, lock_workdir

CONFIG = {"seed": 0, "method": {"rank": 8, "name": "lora"}, "data": {"buckets": [16, 32]}}


def reordered(value):
    if isinstance(value, dict):
        return {key: reordered(value[key]) for key in reversed(value)}
    return value


def test_hash_does_not_depend_on_the_order_of_keys():
    assert json.dumps(CONFIG) != json.dumps(reordered(CONFIG))
    assert config_hash(CONFIG) == config_hash(reordered(CONFIG))


def test_hash_is_the_same_after_a_round_trip_through_json():
    config = plain_config(ConfigDict({**CONFIG, "data": {"buckets": (16, 32)}}))
    assert config_hash(config) == config_hash(json.loads(json.dumps(config)))
    assert config_hash(config) == config_hash(CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"method": {"rank": 4, "name": "lora"}},
        {"data": {"buckets": [32, 16]}},
        {"extra": None},
        {"workdir_of_data": "x"},
    ],
)
def test_hash_tells_other_mathematics_apart(changes):
    assert config_hash(CONFIG | changes) != config_hash(CONFIG)


@pytest.mark.parametrize(
    "changes",
    [
        {"workdir": "elsewhere"},
        {"mesh": {"data": 8}},
        {"logging": {"level": "debug"}},
        {"train": {"log_every_steps": 7}},
    ],
)
def test_hash_leaves_out_workdir_mesh_and_logging(changes):
    assert config_hash(CONFIG | changes) == config_hash(CONFIG)


def test_another_process_is_locked_out_and_told_by_whom(tmp_path):
    script = """
import sys
from lora_jax.core.errors import RequestError
from lora_jax.train.workdir import lock_workdir
for line in sys.stdin:
    try:
        with lock_workdir(sys.argv[1]):
            print("got it", flush=True)
    except RequestError as error:
        print(error, flush=True)
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:

        def ask():
            other.stdin.write("try\n")
            other.stdin.flush()
            return other.stdout.readline()

        with lock_workdir(tmp_path):
            said = ask()
        assert f"workdir {tmp_path} is in use" in said
        assert f"process {os.getpid()} on {socket.gethostname()}" in said
        # Released, the file that the last holder left locks nobody out.
        assert (tmp_path / ".lock").exists()
        assert ask() == "got it\n"
        other.stdin.close()


def test_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="file/runs"), lock_workdir(tmp_path / "file" / "runs"):
        pass


def test_cell_of_another_config_lists_what_differs(tmp_path):
    claim_cell(tmp_path / "cell", CONFIG)
    written = (tmp_path / "cell" / "config.json").read_bytes()
    claim_cell(tmp_path / "cell", reordered(CONFIG) | {"workdir": "elsewhere"})
    other = {**CONFIG, "method": {"rank": 4, "name": "lora", "alpha": 2.0}}
    with pytest.raises(RequestError) as caught:
        claim_cell(tmp_path / "cell", other)
    message = str(caught.value)
    assert "method.rank is 8 there, 4 here" in message
    assert "method.alpha is '(not set)' there, 2.0 here" in message
    assert "seed" not in message
    assert "\n" not in message
    assert (tmp_path / "cell" / "config.json").read_bytes() == written


def test_damaged_config_of_a_cell_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"seed": ')
    with pytest.raises(RequestError, match="config.json"):
        claim_cell(tmp_path, CONFIG)


def test_what_a_killed_writer_left_is_removed(tmp_path):
    (tmp_path / ".card.json.x1.tmp").write_text("half")
    (tmp_path / ".adapter.x2.tmp").mkdir()
    (tmp_path / "notes.tmp").write_text("the user's own")
    claim_cell(tmp_path, CONFIG)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "notes.tmp"]
