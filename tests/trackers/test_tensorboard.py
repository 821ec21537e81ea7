"""TensorBoard's files: the numbers, each step once, whatever a killed process left."""

import struct

import pytest
from tensorboardX.proto.event_pb2 import Event

from lora_jax.trackers import TensorBoard
from lora_jax.trackers.tensorboard import steps_in


def start(folder, name="cell"):
    board = TensorBoard(folder)
    return board, board.start(name, "", {}, "0" * 16)


def read_events(folder):
    """`[(step, tag, value)]` of every file in order, by the TFRecord framing."""
    found = []
    for path in sorted(folder.glob("*/tensorboard/*")):
        content = path.read_bytes()
        while len(content) > 12 and len(content) >= 16 + struct.unpack("<Q", content[:8])[0]:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            found += [(event.step, one.tag, one.simple_value) for one in event.summary.value]
            content = content[16 + length :]
    return found


def test_files_hold_the_numbers_and_say_which_step_is_last(tmp_path):
    board, last = start(tmp_path)
    assert last is None
    for step in (3, 6):
        board.log(step, {"train/loss": 1 / step, "validation/loss": 0.5})
    wanted = [(3, "train/loss", 1 / 3), (3, "validation/loss", 0.5),
              (6, "train/loss", 1 / 6), (6, "validation/loss", 0.5)]  # fmt: skip
    # Before the end, too: somebody looks on.
    assert read_events(tmp_path) == [(s, t, pytest.approx(x)) for s, t, x in wanted]
    assert start(tmp_path)[1] == 6
    assert len(list(tmp_path.glob("cell/tensorboard/events*"))) == 2
    assert start(tmp_path, "other")[1] is None


def test_a_torn_event_counts_as_none(tmp_path):
    board, _ = start(tmp_path)
    board.log(3, {"train/loss": 1.0})
    (path,) = tmp_path.glob("cell/tensorboard/events*")
    whole = path.read_bytes()
    board.log(6, {"train/loss": 0.5})
    longer = path.read_bytes()
    for length in range(len(whole), len(longer)):
        path.write_bytes(longer[:length])
        assert max(steps_in(path.parent)) == 3
    path.write_bytes(longer)
    assert max(steps_in(path.parent)) == 6


@pytest.mark.parametrize("name", ["lora-.*/kernel-r1", "..", ".hidden", "a/b", "a b", "a%2Fb"])
def test_any_name_is_a_folder_of_its_own(tmp_path, name):
    board, _ = start(tmp_path / "in", name)
    board.log(1, {"x": 1.0})
    (path,) = tmp_path.rglob("events*")
    assert path.parent.parent.parent == tmp_path / "in"
    assert start(tmp_path / "in", "a_b")[1] is None
