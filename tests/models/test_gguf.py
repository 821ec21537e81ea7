"""A GGUF file gives the numbers that were written, or one line that says what is wrong with it."""

import random
import struct
import time
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from lora_jax.core.errors import RequestError
from lora_jax.io.gguf.reader import read_gguf
from lora_jax.models.gguf.llama import gguf_config, gguf_tensors
from lora_jax.models.gguf.tokenizer import gguf_tokenizer
from tests.models.gguf_files import refused, tiny_llama, write

TYPES = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("gguf") / "tiny.gguf")[0]


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_tensors_are_those_of_the_library(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("lora_jax.io.gguf.reader._CHUNK_BYTES", 1000)  # Three rows at a time.
    array = np.random.default_rng(1).normal(size=(3, 5, 64)).astype(np.float32)
    path = write(tmp_path / "a.gguf", {}, {"a.weight": (array, kind), "b": (array[0, 0], kind)})
    tensors = read_gguf(path).tensors
    for tensor, name in zip(gguf.GGUFReader(path).tensors, ("a.weight", "b"), strict=True):
        expected = gguf.dequantize(tensor.data, kind).reshape(tensors.shape_of(name))
        np.testing.assert_array_equal(tensors[name], expected)
        assert tensors[name].dtype == np.float32 and tensors[name].flags.c_contiguous
    assert tensors.shape_of("a.weight") == array.shape and tensors.type_of("b") == kind.name
    assert list(tensors) == ["a.weight", "b"] and len(tensors) == 2 and "c" not in tensors
    np.testing.assert_allclose(tensors["a.weight"], array, atol={"Q4_1": 0.3}.get(kind.name, 0.03))


@pytest.mark.parametrize("kind", [Type.Q8_0, Type.Q4_1], ids=lambda kind: kind.name)
def test_blocks_expand_by_their_formula(tmp_path, kind):
    array = np.random.default_rng(2).normal(size=(7, 96)).astype(np.float32)
    path = write(tmp_path / "a.gguf", {}, {"a": (array, kind)})
    blocks = gguf.quants.quantize(array, kind).reshape(7 * 3, -1)
    if kind == Type.Q8_0:  # w = d q: d in float16, 32 signed bytes
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
        expected = scale * blocks[:, 2:].view(np.int8)
    else:  # w = d q + m: d and m in float16, the low halves of 16 bytes, then the high ones
        scale, least = blocks[:, :4].copy().view(np.float16).astype(np.float64).T[..., None]
        expected = scale * np.hstack([blocks[:, 4:] & 15, blocks[:, 4:] >> 4]) + least
    np.testing.assert_array_equal(
        read_gguf(path).tensors["a"], expected.astype(np.float32).reshape(7, 96)
    )


def test_metadata_are_those_of_the_library(tiny):
    fields = gguf.GGUFReader(tiny).fields
    expected = {k: f.contents() for k, f in fields.items() if not k.startswith("GGUF.")}
    assert dict(read_gguf(tiny).metadata) == expected


def test_one_tensor_is_expanded_at_a_time(tmp_path):
    array = np.ones((1 << 12, 1 << 11), np.float32)  # 32 MB
    path = write(tmp_path / "a.gguf", {}, {"a": (array, Type.Q8_0), "b": (array, Type.Q8_0)})
    tensors = read_gguf(path).tensors
    tensors["a"].sum()  # What is imported on the way does not count.
    tracemalloc.start()
    assert "a" in tensors and tensors.keys() & {"a"} and tensors.shape_of("a") == array.shape
    assert tracemalloc.get_traced_memory()[1] < 1e6
    assert sum(tensor[0, 0] for tensor in tensors.values()) == pytest.approx(2.0, rel=1e-3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The loop holds one while it expands the next; the third part is the pieces.
    assert peak < 2.9 * array.nbytes


def test_files_of_other_kinds_are_named(tmp_path, tiny):
    content = tiny.read_bytes()
    path = tmp_path / "a.gguf"
    refused("does not exist", read_gguf, path)
    refused("does not exist or is not a file", read_gguf, tmp_path)
    for other in (b"", b"GG", b"PK\x03\x04 zip", bytes(100), random.Random(0).randbytes(5000)):
        path.write_bytes(other)
        refused("is not a GGUF file", read_gguf, path)
    for version in (0, 1, 4, 1 << 31):
        path.write_bytes(content[:4] + struct.pack("<I", version) + content[8:])
        refused(rf"is GGUF version {version}, and versions 2 and 3", read_gguf, path)
    path.write_bytes(content[:4] + struct.pack("<I", 2) + content[8:])
    assert read_gguf(path).metadata == read_gguf(tiny).metadata
    big = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(big, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    refused("big-endian", read_gguf, big)


def entry(key, kind, value):
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


ABSURD = {
    "tensors": (1 << 60, 0, b""),
    "entries": (0, 1 << 60, b""),
    "more than bytes": (0, 100, bytes(200)),
    "string": (0, 1, entry(b"k", 8, struct.pack("<Q", 10 << 30))),
    "key": (0, 1, struct.pack("<Q", 1 << 63) + bytes(99)),
    "strings": (0, 1, entry(b"k", 9, struct.pack("<IQ", 8, 1 << 40))),
    "numbers": (0, 1, entry(b"k", 9, struct.pack("<IQ", 4, 1 << 62))),
    "empty strings": (0, 1, entry(b"k", 9, struct.pack("<IQ", 8, 3 << 20)) + bytes(25 << 20)),
    "arrays in arrays": (0, 1, entry(b"k", 9, struct.pack("<IQ", 9, 1)) + bytes(99)),
    "value type": (0, 1, entry(b"k", 77, bytes(99))),
    "alignment": (0, 1, entry(b"general.alignment", 4, struct.pack("<I", 48))),
    "alignment's type": (0, 1, entry(b"general.alignment", 8, struct.pack("<Q", 2) + b"32")),
    "twice": (0, 2, entry(b"k", 0, b"1") * 2),
    "two lines": (0, 1, entry(b"k\nl", 0, b"1")),
    "not UTF-8": (0, 1, entry(b"k", 8, struct.pack("<Q", 2) + b"\xff\xff")),
    "axes": (1, 0, struct.pack("<Q1sI", 1, b"t", 1 << 30) + bytes(99)),
    "five axes": (1, 0, struct.pack("<Q1sI5QIQ", 1, b"t", 5, 1, 1, 1, 1, 1, 0, 0) + bytes(99)),
    "axis": (1, 0, struct.pack("<Q1sIQQIQ", 1, b"t", 2, 1 << 62, 1 << 62, 0, 0) + bytes(99)),
    "empty axis": (1, 0, struct.pack("<Q1sIQQIQ", 1, b"t", 2, 0, 1 << 62, 0, 0) + bytes(99)),
    "offset": (1, 0, struct.pack("<Q1sIQIQ", 1, b"t", 1, 4, 0, 1 << 63) + bytes(99)),
    "block": (1, 0, struct.pack("<Q1sIQIQ", 1, b"t", 1, 33, 8, 0) + bytes(99)),
}


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_claims_fail_at_once(tmp_path, name):
    num_tensors, num_entries, rest = ABSURD[name]
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, num_tensors, num_entries) + rest)
    read = tmp_path / "ok.gguf"
    read.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    assert not read_gguf(read).metadata and not read_gguf(read).tensors
    start = time.process_time()
    tracemalloc.start()
    refused("truncated or damaged.*; download or copy it again", read_gguf, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < 5.0 and peak < 20e6


def test_ten_gigabytes_of_metadata_are_not_read(tmp_path):
    path = tmp_path / "a.gguf"
    with path.open("wb") as file:
        start = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)
        file.write(start + entry(b"k", 8, struct.pack("<Q", 10 << 30)))
        file.truncate(11 << 30)  # A sparse file: it has the bytes that it claims.
    refused("claims more than 67108864 bytes of metadata", read_gguf, path)


def test_a_file_cut_anywhere_is_refused(tmp_path, tiny):
    content = tiny.read_bytes()
    path = tmp_path / "a.gguf"
    lengths = [*range(0, 400, 7), *np.linspace(400, len(content) - 33, 60, dtype=int)]
    for length in lengths:
        path.write_bytes(content[:length])
        refused("is not a GGUF file|truncated or damaged", read_gguf, path)


def test_a_file_cut_after_opening_is_refused(tmp_path):
    path, _ = tiny_llama(tmp_path / "a.gguf")
    file = read_gguf(path)
    path.write_bytes(path.read_bytes()[:-999])
    refused("output_norm.weight' was cut off", file.tensors.__getitem__, "output_norm.weight")
    path.unlink()
    refused("cannot read", file.tensors.__getitem__, "output_norm.weight")


def test_number_formats_that_cannot_be_expanded_are_named(tmp_path):
    def file_of(kind):
        info = struct.pack("<Q3sIQIQ", 3, b"odd", 1, 256, kind, 0)
        path = tmp_path / f"{kind}.gguf"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info + bytes(4096))
        return path

    for kind in (Type.Q8_K, Type.I32, Type.F64):
        tensors = read_gguf(file_of(kind)).tensors
        message = refused(f"'odd' is of type {kind.name}", tensors.__getitem__, "odd")
        known = message.split("one of ")[1]
        assert "F32, F16" in known and "Q8_0" in known and "Q8_K" not in known
    message = refused("'odd' is of type 4242", read_gguf, file_of(4242))
    assert "Q8_0" in message and "update gguf" in message


def read_all(path):
    file = read_gguf(path)
    return gguf_config(file), dict(gguf_tensors(file)), gguf_tokenizer(file)


def test_mutated_files_are_read_or_refused(tmp_path, tiny):
    content = tiny.read_bytes()
    header = len(content) - sum(4 * x.size for x in read_gguf(tiny).tensors.values())
    rng = random.Random(0)
    path = tmp_path / "a.gguf"
    num_read, start = 0, time.process_time()
    for _ in range(120):
        mutated = bytearray(content)
        for _ in range(rng.choice((1, 1, 4, 32))):
            # Most damage where a little of it does most: counts, lengths and types at the start.
            place = rng.randrange(rng.choice((64, 1200, header)))
            mutated[place] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        if rng.random() < 0.2:
            place = rng.randrange(header)
            mutated[place:place] = rng.randbytes(rng.randrange(1, 40))
        path.write_bytes(mutated)
        try:
            read_all(path)
            num_read += 1
        except RequestError as error:
            assert "\n" not in str(error)
    assert 0 < num_read < 120 and time.process_time() - start < 30
