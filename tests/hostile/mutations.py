"""What somebody else's file may be: damaged bytes, other JSON values, other kinds of file."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

DEEP = 100_000
SCALARS: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400,
    float("nan"), float("inf"), float("-inf"), 1e308, 1e-320, "", "x", "4", "nan", "\0", "a\0b",
    "../../outside", "../../../outside/precious", "/etc/passwd", "/dev/zero", "~", "~root",
    "a" * 300, "a" * 10_000, "\x1b[31mred\x1b[0m", "\x9b2J", "\u202egnp", "\ud800", "é",
    "two\nlines", "$(x)", "`x`", "{0}", "%s", "[red]", "(.|[a-z._0-9])*X", "(", "*",
    ".*", "all-linear",
)  # fmt: skip
TREES: tuple[Any, ...] = (
    [], {}, [[]], [None], {"a": 1}, {"": {}}, {"name": "../../outside"}, [1, 2, 3], ["x"], [{}],
    {"kernel": [1]}, [["x", 1]], list(range(2000)), {str(n): n for n in range(500)},
)  # fmt: skip


def value_of(rng: random.Random) -> Any:
    """A hostile JSON value."""
    return rng.choice(SCALARS if rng.random() < 0.75 else TREES)


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    if not isinstance(tree, dict | list):
        return []
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        found.append((tree, key))
        found += places(value)
    return found


def change_json(tree: Any, rng: random.Random) -> tuple[Any, str]:
    """A changed tree, and what was changed."""
    found = places(tree)
    if not found or rng.random() < 0.03:
        value = value_of(rng)
        return value, f"whole={value!r:.60}"
    holder, key = rng.choice(found)
    what = rng.choice(["replace"] * 6 + ["remove", "add", "rename", "wrap", "swap", "near"])
    if what == "remove":
        del holder[key]
    elif what == "add" and isinstance(holder, dict):
        holder[rng.choice(["", "x" * 300, "../x", "\0", "use_x", "x.y", "__class__"])] = value_of(
            rng
        )
    elif what == "rename" and isinstance(holder, dict):
        name = rng.choice(["", "x" * 300, "../x", "\0", "\x1b[31m", "a.b", "/", f"{key}x"])
        holder[name] = holder.pop(key)
    elif what == "wrap":
        for _ in range(rng.choice([1, 2, 60])):
            holder[key] = [holder[key]] if rng.random() < 0.5 else {"x": holder[key]}
    elif what == "swap":
        other, place = rng.choice(found)
        holder[key] = json.loads(json.dumps(other[place])) if place in _keys(other) else None
    elif what == "near" and type(holder[key]) in (int, float):
        holder[key] = rng.choice(
            [-holder[key], holder[key] + 1, str(holder[key]), holder[key] * 1e9]
        )
    else:
        what, holder[key] = "replace", value_of(rng)
    return tree, f"{what} {key!r:.40} -> {_get(holder, key)!r:.60}"


def _keys(holder: Any):
    return holder if isinstance(holder, dict) else range(len(holder))


def _get(holder: Any, key: Any) -> Any:
    return holder[key] if key in _keys(holder) else "(gone)"


def dumped(tree: Any) -> bytes:
    return json.dumps(tree, indent=1).encode()


def change_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Changed bytes, and how."""
    at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    what = rng.choice(["flip", "cut", "head", "insert", "repeat", "drop", "nul", "bom", "deep"])
    if what == "flip" and data:
        changed = bytearray(data)
        for _ in range(rng.choice([1, 1, 4, 40])):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed), f"flip {at}"
    if what == "deep":
        opening = rng.choice([b"[", b'{"a":'])
        return opening * DEEP + rng.choice([b"", data]), f"deep {opening!r}"
    made = {
        "cut": data[:at], "head": data[at:], "insert": data[:at] + rng.randbytes(8) + data[at:],
        "repeat": data[:end] + data[at:end] + data[end:], "drop": data[:at] + data[end:],
        "nul": data[:at] + b"\0" + data[at:], "bom": b"\xef\xbb\xbf" + data, "flip": b"x",
    }  # fmt: skip
    return made[what], f"{what} {at}:{end}"


def change_lines(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A changed .jsonl."""
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    what = rng.choice(["twice", "shuffle", "remove", "value", "inside", "inside", "inside", "long"])
    if what == "twice":
        lines.insert(at, lines[at])
    elif what == "shuffle":
        rng.shuffle(lines)
    elif what == "remove":
        del lines[at]
    elif what == "value":
        lines[at] = json.dumps(value_of(rng)).encode()
    elif what == "long":
        lines[at] = b" " * 10_000 + lines[at]
    elif lines[at]:
        tree, what = change_json(json.loads(lines[at]), rng)
        lines[at] = json.dumps(tree).encode()
    return b"\n".join(lines), f"line {at}: {what}"


def change_tensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file with another header: shapes, offsets, dtypes, names, 65 axes."""
    size = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + size]), data[8 + size :]
    names = [name for name in header if name != "__metadata__"]
    entry, what = header[rng.choice(names)], rng.choice(["axes", "shape", "dtype", "json", "size"])
    if what == "axes":
        entry["shape"] = [1] * rng.choice([65, 33, 1000]) + entry["shape"]
    elif what == "shape":
        entry["shape"] = rng.choice([[0], [], entry["shape"][::-1], [2**40, 2**40], [0, 2**63 - 1],
                                     [-1], [1.5], [2**62, 4]])  # fmt: skip
    elif what == "dtype":
        entry["dtype"] = rng.choice(
            ["F64", "I32", "BF16", "F16", "F8_E4M3", "BOOL", "U64", "F4", "x"]
        )
    elif what == "json":
        header, what = change_json(header, rng)
    text = json.dumps(header).encode()
    length = rng.choice([0, 2**63, 10**6]) if what == "size" else len(text)
    return length.to_bytes(8, "little") + text + rest, f"header {what}: {text[-80:]!r}"


def change_values(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A safetensors file with other numbers: infinite, not a number, huge."""
    size = 8 + int.from_bytes(data[:8], "little")
    bits = rng.choice([b"\0\0\x80\x7f", b"\0\0\xc0\x7f", b"\xff\xff\x7f\x7f", b"\1\0\0\0"])
    at = size + 4 * rng.randrange(max(1, (len(data) - size) // 4))
    return data[:at] + bits + data[at + 4 :], f"value {bits.hex()} at {at}"


def change_kind(path: Path, outside: Path, rng: random.Random) -> str:
    """Something else at `path`: nothing, a link, a FIFO, a folder, a device."""
    what = rng.choice(
        ["gone", "out", "out", "dangling", "loop", "fifo", "folder", "empty", "dev", "up"]
    )
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    if what == "out":
        path.symlink_to(rng.choice([outside, outside / "precious", outside / "precious.json"]))
    elif what == "dangling":
        path.symlink_to(outside / "new")
    elif what == "loop":
        path.symlink_to(path)
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "folder":
        path.mkdir()
    elif what == "empty":
        path.touch()
    elif what == "dev":
        path.symlink_to(rng.choice(["/dev/zero", "/dev/null", "/dev/stdin"]))
    elif what == "up":
        path.symlink_to("..")
    return f"becomes {what}"


def mutate(path: Path, outside: Path, rng: random.Random) -> str:
    """Changes the file or folder at `path`; what was done."""
    if path.is_dir() or rng.random() < 0.12:
        return change_kind(path, outside, rng)
    data = path.read_bytes()
    how = change_bytes
    if path.suffix == ".jsonl" and rng.random() < 0.8:
        how = change_lines
    elif path.suffix == ".safetensors" and rng.random() < 0.8:
        how = rng.choice([change_tensors, change_tensors, change_values])
    elif path.suffix == ".json" and rng.random() < 0.8:
        tree, what = change_json(json.loads(data), rng)
        path.write_bytes(dumped(tree))
        return what
    data, what = how(data, rng)
    path.write_bytes(data)
    return what
