"""How a benchmark is taken and kept: in turn, as ratios of the same round, with its machine."""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lora_jax.io import write_json
from lora_jax.train.environment import device_description, git_commit, versions


def in_turn(functions: Mapping[str, Callable[[], object]], *, times: int) -> dict:
    """Times two functions alternately: seconds each, and the first's ratio to the second.

    `ratio` is the median of the pairs' ratios, `ratio_quartiles` their quartiles. One call of each
    goes before, untimed.
    """
    (first, run_first), (second, run_second) = functions.items()
    seconds: dict[str, list[float]] = {first: [], second: []}
    run_first(), run_second()
    gc.collect()
    for number in range(times):
        pair = [(first, run_first), (second, run_second)]
        for name, run in pair if number % 2 else reversed(pair):
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {
        "median_seconds": {name: statistics.median(values) for name, values in seconds.items()},
        **ratio_of(seconds[first], seconds[second]),
        "times": times,
    }


def ratio_of(first: Sequence[float], second: Sequence[float]) -> dict:
    """The median and the quartiles of `first[n] / second[n]`, where n is a round of the benchmark.

    Both of a round are taken right after each other, so what else the machine does is in both.
    """
    ratios = [x / y for x, y in zip(first, second, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"ratio": median, "ratio_quartiles": [low, high]}


def write_record(name: str, record: dict, folder: str | None) -> None:
    """Prints the record, and keeps it as `folder/name.json` with versions and device."""
    record = {
        **record,
        "device": device_description(),
        "versions": versions(),
        "commit": git_commit(),
    }
    print(json.dumps(record, indent=2))
    if folder is not None:
        write_json(Path(folder) / f"{name}.json", record)
