"""`lora-jax analyze`."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_jax.cli.requests import Parser, add_json, cell_of, say
from lora_jax.core.errors import RequestError

if TYPE_CHECKING:
    from lora_jax.analysis.adapters import Kernels
    from lora_jax.peft.factors import AdapterFactors
    from lora_jax.report.adapters import Analysis

EXAMPLES = """\
Examples:
  What an adapter learned: spectra and effective ranks of every ΔW. Any folder in PEFT's format, of
  any model; no model is loaded:
    lora-jax analyze path/to/adapter
  What two of them have in common (φ of Hu et al. 2021, beside that of random subspaces):
    lora-jax analyze seed-0 seed-1 --out=analysis.html
  ΔW beside W as well: amplification, W's directions, intruder dimensions. Only the base's
  safetensors are read, one matrix at a time:
    lora-jax analyze path/to/adapter --base=path/to/model --modules='layers\\.(0|15)\\.'
  Runs of this project (their base is known):
    lora-jax analyze runs/mine/cells/r8-s0 runs/mine/cells/r64-s0

The page opens as a file. --json prints every number of it, grids in full.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "analyze",
        description="What adapters learned: spectra, similarity of subspaces, ΔW beside W.",
        epilog=EXAMPLES,
    )
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="a folder in PEFT's format, a hub id, or a run's WORKDIR/cells/NAME",
    )
    parser.add_argument("--base", help="the base's folder or hub id: ΔW is shown beside W")
    parser.add_argument("--modules", metavar="REGEX", help="only matrices whose name has a match")
    parser.add_argument(
        "--directions",
        type=int,
        metavar="N",
        help="φ of the first N directions (default: all, to 64)",
    )
    parser.add_argument("--out", default=".", help="an .html path or a folder (default: here)")
    add_json(parser)
    options = parser.parse_args(argv)
    paths = [_place(path) for path in options.adapters]
    if twice := [p for n, p in enumerate(paths) if p in paths[:n]]:
        raise RequestError(f"{twice[0]} is given twice; similarity needs two different adapters")

    from lora_jax.report.adapters import analysis_json, page_path, write_analysis

    out = page_path(_place(options.out))
    analysis = _analyse(paths, options.base, options.modules, options.directions)
    page = write_analysis(analysis, out)
    if options.json:
        say(json.dumps({"page": str(page), **analysis_json(analysis)}))
    else:
        _print(analysis)
        say(f"the page: {page.resolve().as_uri()}")
    return 0


def _place(text: str) -> str:
    """A folder's full path; what is none may be a hub id and stays as it is."""
    try:
        path = Path(text).expanduser()
        return str(path.resolve()) if path.exists() else str(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise RequestError(f"{text[:80]!r} is no path: {error}") from error


def _analyse(paths, base, modules, directions) -> Analysis:
    from lora_jax.analysis.adapters import (
        NUM_DIRECTIONS,
        compare_adapters,
        profile_adapter,
        select,
    )
    from lora_jax.peft.factors import plain_text
    from lora_jax.report.adapters import Analysis

    names = [plain_text(name) for name in distinct_names(paths)]
    loaded = [_load(path, name, base) for path, name in zip(paths, names, strict=True)]
    are_runs = {_is_run(path) for path in paths}
    if modules is not None:
        loaded = [(select(adapter, modules), kernel) for adapter, kernel in loaded]
    _check_directions(directions, [adapter for adapter, _ in loaded])
    num = sum(len(adapter.factors) for adapter, _ in loaded)
    couples = list(itertools.combinations([adapter for adapter, _ in loaded], 2))
    num += sum(len(one.factors.keys() & other.factors.keys()) for one, other in couples)
    with _Bar(num) as bar:
        profiles = {a.name: profile_adapter(a, k, on_progress=bar.step) for a, k in loaded}
        pairs = tuple(
            compare_adapters(
                one, other, num_directions=directions or NUM_DIRECTIONS, on_progress=bar.step
            )
            for one, other in couples
        )
    notes = _notes(loaded, pairs, base) + _shared_starts(paths, names)
    if len(are_runs) > 1:
        notes.append(
            "A run's matrices have this project's names, a PEFT folder's those of transformers: to "
            "compare them, write the run in PEFT's format first (lora-jax convert)."
        )
    return Analysis(profiles, pairs, tuple(notes), base or "")


def _shared_starts(paths: Sequence[str], names: Sequence[str]) -> list[str]:
    """Runs of one seed: what their `a` have in common need not be learned."""
    of_seed: dict[int, list[str]] = {}
    for path, name in zip(paths, names, strict=True):
        if _is_run(path):
            seed = _seed_of(path)
            of_seed.setdefault(seed, []).append(name)
    return [
        f"{' and '.join(some)} have the same seed, {seed}, so that their `a` began with the same "
        "columns: part of what they share is that start. Compare runs of different seeds."
        for seed, some in of_seed.items()
        if len(some) > 1
    ]


def _seed_of(path: str) -> int:
    from lora_jax.models.config_fields import read_json

    folder = Path(path)
    place = folder / "method.json"
    place = place if place.is_file() else cell_of(path) / "adapter" / "method.json"
    return read_json(place, kind=dict)["seed"]


def _is_run(path: str) -> bool:
    from lora_jax.serve.adapters import is_peft

    return not is_peft(path) and Path(path).is_dir()


def _load(path: str, name: str, base: str | None) -> tuple[AdapterFactors, Kernels | None]:
    import dataclasses

    from lora_jax.analysis.adapters import factors_of, kernels_of
    from lora_jax.peft.factors import BaseKernels, read_factors
    from lora_jax.serve.adapters import load_adapter

    if not _is_run(path):
        adapter = dataclasses.replace(read_factors(path), name=name)
        return adapter, BaseKernels(base).kernel if base else None
    if base:
        raise RequestError(f"--base={base} is for adapters in PEFT's format; {path} knows its own")
    adapted = load_adapter(path)
    model, method, trainable = adapted.model, adapted.method, adapted.trainable
    adapter = factors_of(method, trainable, model.params, name=name)
    adapter = dataclasses.replace(adapter, base=f"{model.name} ({model.base_hash[:12]})")
    return adapter, kernels_of(method, trainable, model.params)


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of some paths that tell them apart.

    >>> distinct_names(["runs/a/adapter", "runs/b/adapter/"])
    ['a/adapter', 'b/adapter']
    """
    parts = [[part for part in Path(path).parts if part != "/"] for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _check_directions(directions: int | None, adapters: Sequence[AdapterFactors]) -> None:
    if directions is None:
        return
    if len(adapters) < 2:
        raise RequestError(
            f"--directions={directions} is of the similarity of two adapters, and there is one; "
            "name another"
        )
    most = max(one.rank for adapter in adapters for one in adapter.factors.values())
    if not 1 <= directions <= most:
        raise RequestError(
            f"--directions={directions}; the adapters have 1 to {most}, their largest rank"
        )


def _notes(loaded, pairs, base) -> list[str]:
    adapters = [adapter for adapter, _ in loaded]
    notes = []
    bases = {adapter.base for adapter in adapters if adapter.base}
    notes += [
        f"{adapter.name}: {len(adapter.skipped)} convolutions are left out; only matrices are "
        "analysed."
        for adapter in adapters
        if adapter.skipped
    ]
    if len(bases) > 1:
        notes.append(
            "The adapters name different bases: "
            + "; ".join(f"{adapter.name} {adapter.base or 'none'}" for adapter in adapters)
            + ". Directions of different models have no common meaning, even where shapes agree."
        )
    for pair in pairs:
        both = f"{pair.first} and {pair.second}"
        if not pair.profiles and not pair.unlike:
            notes.append(
                f"{both} have no common matrix, so there is nothing to compare: the first ones are "
                f"{', '.join(pair.alone[:3])}."
            )
        if pair.unlike:
            notes.append(
                f"{both}: {len(pair.unlike)} matrices of one name have different shapes "
                f"({pair.unlike[0]}, for one); they are of different bases and are left out."
            )
        elif pair.profiles and pair.alone:
            notes.append(f"{both}: {len(pair.alone)} matrices are changed by one alone.")
    for adapter in adapters:
        if adapter.is_dora:
            notes.append(
                f"{adapter.name} is DoRA: what is shown is its low-rank part, without the gain "
                "that scales the columns of W + ΔW."
            )
    if base is None and any(kernel is None for _, kernel in loaded):
        notes.append("Without --base=FOLDER there is no W to look at beside ΔW.")
    return notes


def _print(analysis: Analysis) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lora_jax.report.adapters import headline, summary_rows

    console = Console(width=None if sys.stdout.isatty() else 110)
    for name, profiles in analysis.profiles.items():
        table = Table(title=Text(name), title_justify="left")
        head = ("matrix", "layers", "‖ΔW‖", "stable rank", "entropy rank", "90% of energy")
        if profiles[0].amplification is not None:
            head += ("amplification", "intruders")
        for number, title in enumerate(head):
            table.add_column(title, justify="right" if number else "left", overflow="fold")
        for row in summary_rows(profiles):
            table.add_row(*map(Text, row))
        console.print(table)
    for line in (*headline(analysis), *(f"Note: {note}" for note in analysis.notes)):
        console.print(Text(line))


class _Bar:
    """A progress bar on stderr, where somebody looks; a matrix of an LLM takes a while."""

    def __init__(self, total: int):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.fields[module]}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task("", total=total, module="")

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def step(self, module: str) -> None:
        self._progress.update(self._task, advance=1, module=module[-48:])
