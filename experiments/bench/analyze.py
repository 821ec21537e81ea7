r"""`lora-jax analyze` and gradience on the same adapters: processor seconds and numbers.

    python -m experiments.bench.analyze --gradience=.venv-gradience/bin/python \
        --out=experiments/results/bench

Random adapters in PEFT's format, float32: one and a pair of MiniLM's shapes, one and a pair of a 7B
model's. Each command is a process of its own, user and system time together, from the interpreter's
start to the written page, on one thread; gradience's are `audit` and `merge-audit` (version 0.11).
The two are taken in turn, `--rounds` times after one round that does not count; ratios are medians
and quartiles of the rounds' ratios, ours over gradience's. `many` is ours alone: every two of
`--many` adapters of MiniLM's shapes.

Then the numbers: effective rank, 90% and 99% rank of every matrix, ours against gradience's; and
‖ΔW‖ of adapters that differ in how PEFT scales them, both against the dense ΔW in float64.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from experiments.bench.record import ratio_of, write_record

# How PEFT scales ΔW: fields of the config, for rank 8 and alpha 16.
SCALES: dict[str, dict] = {
    "alpha / rank": {},
    "use_rslora": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"v_proj": 4}},
    "alpha_pattern, an expression": {"alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 4}},
    "rank_pattern": {"rank_pattern": {"v_proj": 4}},
}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gradience", help="a Python that has gradience (default: ours alone)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", default="6x384x8", help="layers x width x rank")
    parser.add_argument("--large", default="32x4096x16", help="the same; none to leave it out")
    parser.add_argument("--many", type=int, default=32)
    parser.add_argument("--out", help="folder of the record (default: print only)")
    return parser.parse_args(arguments)


def write_adapter(
    folder: Path, layers: int, width: int, rank: int, *, seed: int, alpha: int = 16, **fields
) -> None:
    """A random adapter of q and v, whose singular values fall; ranks by `rank_pattern`."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for layer in range(layers):
        for kind in ("q_proj", "v_proj"):
            r = fields.get("rank_pattern", {}).get(kind, rank)
            at = f"base_model.model.model.layers.{layer}.self_attn.{kind}"
            a = rng.normal(size=(r, width)) * np.exp(-np.arange(r) / 3)[:, None]
            tensors[f"{at}.lora_A.weight"] = (a / np.sqrt(width)).astype(np.float32)
            b = 0.02 * rng.normal(size=(width, r))
            tensors[f"{at}.lora_B.weight"] = b.astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, **fields}
    config["target_modules"] = ["q_proj", "v_proj"]
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def seconds_of(command: Sequence[str]) -> tuple[float, str]:
    """Processor seconds of a process, user and system, and its standard output."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, done.stdout


def ours(folders: Sequence[Path], page: Path, *more: str) -> list[str]:
    paths = map(str, folders)
    return [sys.executable, "-m", "lora_jax.cli.main", "analyze", *paths, f"--out={page}", *more]


def theirs(python: str, folders: Sequence[Path]) -> list[str]:
    start = [python, "-m", "gradience.cli"]
    if len(folders) == 1:
        return [*start, "audit", "--peft-dir", str(folders[0]), "--json", "--layers"]
    return [*start, "merge-audit", "--adapter-a", str(folders[0]), "--adapter-b", str(folders[1])]


def times(commands: dict[str, list[str]], rounds: int) -> dict:
    """Median seconds of each command, and the first's ratio to the second."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for number in range(rounds + 1):
        order = list(commands) if number % 2 else list(reversed(commands))
        for name in order:
            found, _ = seconds_of(commands[name])
            if number:  # the first round reads files and byte code into the cache
                seconds[name].append(found)
    return times_of(seconds)


def times_of(seconds: dict[str, list[float]]) -> dict:
    """The record of a row: `{name: seconds of its rounds}`."""
    record: dict = {"median_seconds": {k: statistics.median(v) for k, v in seconds.items()}}
    record["rounds"] = len(next(iter(seconds.values())))
    if len(seconds) == 2:
        record |= ratio_of(*seconds.values())
    return record


def _their_rows(python: str, folder: Path) -> list[dict]:
    """What gradience found of each matrix; of many layers it prints progress before the JSON."""
    printed = seconds_of(theirs(python, [folder]))[1]
    return json.loads(printed[printed.index("{\n") :])["layer_data"]["layer_rows"]


def same_numbers(folder: Path, page: Path, python: str) -> dict[str, float]:
    """The largest differences between our numbers and gradience's, over the matrices."""
    mine = json.loads(seconds_of(ours([folder], page, "--json"))[1])["adapters"][folder.name]
    rows = _their_rows(python, folder)
    other = {row["name"].removeprefix("base_model.model."): row for row in rows}
    assert {one["matrix"] for one in mine} == other.keys()
    names = {
        "effective rank": ("entropy_rank", "effective_rank"),
        "stable rank": ("stable_rank", "stable_rank"),
        "90% rank": ("energy_rank", "energy_rank_90"),
        "99% rank": ("energy_rank_99", "energy_rank_99"),
    }
    return {
        what: max(abs(one[own] - other[one["matrix"]][their]) for one in mine)
        for what, (own, their) in names.items()
    }


def dense_norms(folder: Path) -> dict[str, float]:
    """‖ΔW‖ of every matrix in float64, by PEFT's own rules for what these configs hold."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    found = {}
    for key in tensors:
        if not key.endswith("lora_A.weight"):
            continue
        module = key.removesuffix(".lora_A.weight")
        a, b = (tensors[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
        is_v = module.endswith("v_proj")
        alpha = config["lora_alpha"]
        if is_v and config.get("alpha_pattern"):
            (alpha,) = config["alpha_pattern"].values()
        power = 0.5 if config.get("use_rslora") else 1.0
        norm = alpha / len(a) ** power * np.linalg.norm(b @ a)
        found[module.removeprefix("base_model.model.")] = float(norm)
    return found


def scales(root: Path, size: tuple[int, int, int], python: str | None) -> dict[str, dict]:
    """The largest relative error of ‖ΔW‖ for each way of scaling it."""
    found = {}
    for number, (name, fields) in enumerate(SCALES.items()):
        folder = root / f"scale-{number}"
        write_adapter(folder, *size, seed=0, **fields)
        truth = dense_norms(folder)
        report = json.loads(seconds_of(ours([folder], root / "page.html", "--json"))[1])
        mine = {one["matrix"]: one["delta_norm"] for one in report["adapters"][folder.name]}
        found[name] = {"ours": _largest_error(mine, truth)}
        if python:
            rows = _their_rows(python, folder)
            other = {
                row["name"].removeprefix("base_model.model."): row["delta_fro_norm"] for row in rows
            }
            found[name]["gradience"] = _largest_error(other, truth)
    return found


def _largest_error(found: dict[str, float], truth: dict[str, float]) -> float:
    assert found.keys() == truth.keys()
    return max(abs(found[name] / truth[name] - 1) for name in truth)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = "1"
    record: dict = {}
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        page = root / "page.html"

        def both(folders: Sequence[Path]) -> dict[str, list[str]]:
            commands = {"ours": ours(folders, page)}
            return commands | (
                {"gradience": theirs(options.gradience, folders)} if options.gradience else {}
            )

        for name in ("small", "large"):
            if getattr(options, name) == "none":
                continue
            size = _size(getattr(options, name))
            folders = [root / f"{name}-{seed}" for seed in (0, 1)]
            for seed, folder in enumerate(folders):
                write_adapter(folder, *size, seed=seed)
            record[f"{name}, one"] = times(both(folders[:1]), options.rounds)
            record[f"{name}, a pair"] = times(both(folders), options.rounds)
            record[f"{name}, largest difference"] = options.gradience and same_numbers(
                folders[0], page, options.gradience
            )
        size = _size(options.small)
        crowd = [root / f"many-{seed}" for seed in range(options.many)]
        for seed, folder in enumerate(crowd):
            write_adapter(folder, *size, seed=seed)
        record["many"] = {"adapters": options.many} | times(
            {"ours": ours(crowd, page)}, min(3, options.rounds)
        )
        record["error of the norm"] = scales(root, size, options.gradience)
    write_record("analyze", record, options.out)


def _size(text: str) -> tuple[int, int, int]:
    layers, width, rank = map(int, text.split("x"))
    return layers, width, rank


if __name__ == "__main__":
    main()
