"""`lora-jax analyze`."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lora_jax as lj
from lora_jax.cli.parser import Parser, distinct_names, say

if TYPE_CHECKING:
    from lora_jax.analysis.adapters import Pair
    from lora_jax.analysis.profiles import Kernels
    from lora_jax.peft.factors import AdapterFactors
    from lora_jax.report.adapter_results import Analysis

EXAMPLES = """\
Examples:
  What an adapter learned: spectra and effective ranks of every ΔW. Any folder in PEFT's format, of
  any model; no model is loaded:
    lora-jax analyze path/to/adapter
  What two of them have in common (φ of Hu et al. 2021, next to that of random subspaces):
    lora-jax analyze seed-0 seed-1 --out=analysis.html
  ΔW against W as well: amplification, W's directions, intruder dimensions. Only the base's
  safetensors are read, one matrix at a time:
    lora-jax analyze path/to/adapter --base=path/to/model --modules='layers\\.(0|15)\\.'
  One file of kohya's scripts, and 32 adapters at once (a map and a line for every two):
    lora-jax analyze style.safetensors
    lora-jax analyze seeds/*
  Runs of this project (their base is known):
    lora-jax analyze runs/mine/cells/r8-s0 runs/mine/cells/r64-s0

The page opens as a file. --json prints every number of it, grids in full.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("analyze", epilog=EXAMPLES)
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="a folder in PEFT's format, a hub id, a file of kohya's scripts, or a run's "
        "WORKDIR/cells/NAME",
    )
    parser.add_argument("--base", help="the base's folder or hub id: ΔW is compared with W")
    parser.add_argument("--modules", metavar="REGEX", help="only matrices whose name has a match")
    parser.add_argument(
        "--directions",
        type=int,
        metavar="N",
        help="φ of the first N directions (default: all, to 64)",
    )
    parser.add_argument("--out", default=".", help="an .html path or a folder (default: here)")
    options = parser.parse_args(argv)
    paths = [_place(path) for path in options.adapters]
    if twice := [p for n, p in enumerate(paths) if p in paths[:n]]:
        raise lj.RequestError(f"{twice[0]} is given twice; similarity needs two different adapters")

    if options.base is None:
        _use_one_thread()
    from lora_jax.report.adapter_results import analysis_json
    from lora_jax.report.adapters import write_analysis
    from lora_jax.report.html import page_path

    out = page_path(_place(options.out))
    analysis = _analyse(paths, options.base, options.modules, options.directions)
    page = write_analysis(analysis, out)
    if options.json:
        say(json.dumps({"page": str(page), **analysis_json(analysis)}))
    else:
        _print(analysis)
        say(f"the page: {page.resolve().as_uri()}")
    return 0


def _use_one_thread() -> None:
    """Factors are thin: threads of BLAS would wait for each other longer than they work.

    NumPy reads this when it is first imported, which in this command is later.
    """
    if "numpy" in sys.modules:
        return
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")


def _place(text: str) -> str:
    """A folder's full path; what is none may be a hub id and stays as it is."""
    try:
        path = Path(text).expanduser()
        return str(path.resolve()) if path.exists() else str(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise lj.RequestError(f"{text[:80]!r} is no path: {error}") from error


def _analyse(paths, base, modules, directions) -> Analysis:
    from lora_jax.analysis.adapters import compare_all, select
    from lora_jax.analysis.profiles import NUM_DIRECTIONS, profile_adapter, with_gains
    from lora_jax.peft.factors import plain_text
    from lora_jax.report.adapter_results import Analysis

    names = [plain_text(name) for name in distinct_names(paths)]
    loaded = [_load(path, name, base) for path, name in zip(paths, names, strict=True)]
    if modules is not None:
        for one in loaded:
            one.adapter = select(one.adapter, modules)
    for one in loaded:
        if one.kernel is not None:
            one.adapter = with_gains(one.adapter, one.kernel)
    adapters = [one.adapter for one in loaded]
    _check_directions(directions, adapters)
    couples = list(itertools.combinations(adapters, 2))
    num = sum(len(adapter.factors) for adapter in adapters)
    num += sum(len(one.factors.keys() & other.factors.keys()) for one, other in couples)
    with _progress(num) as step:
        profiles = {
            one.adapter.name: profile_adapter(one.adapter, one.kernel, on_progress=step)
            for one in loaded
        }
        most = directions or NUM_DIRECTIONS
        pairs = tuple(compare_all(adapters, num_directions=most, on_progress=step))
    notes = [*_notes_on_adapters(adapters), *_notes_on_pairs(pairs), *_shared_starts(loaded)]
    if base is None and any(one.kernel is None for one in loaded):
        notes.append("Without --base=FOLDER there is no W to compare ΔW with.")
    if len({one.seed is None for one in loaded}) > 1:
        notes.append(
            "A run's matrices have this project's names, a PEFT folder's those of transformers: to "
            "compare them, write the run in PEFT's format first (lora-jax convert)."
        )
    return Analysis(profiles, pairs, tuple(notes), base or "")


@dataclasses.dataclass
class _Loaded:
    """An adapter, its base's kernels where they are known, and the seed of a run."""

    adapter: AdapterFactors
    kernel: Kernels | None
    seed: int | None = None


def _load(path: str, name: str, base: str | None) -> _Loaded:
    from lora_jax.models.sources import is_peft
    from lora_jax.peft import kohya
    from lora_jax.peft.factors import BaseKernels, read_factors

    if kohya.is_file(path):
        if base:
            raise lj.RequestError(
                f"--base={base} is for adapters in PEFT's format; {path} does not name modules as "
                "a base's tensors do"
            )
        return _Loaded(dataclasses.replace(kohya.read_kohya(path), name=name), None)
    if is_peft(path) or not Path(path).is_dir():
        adapter = dataclasses.replace(read_factors(path), name=name)
        return _Loaded(adapter, BaseKernels(base).kernel if base else None)
    if base:
        raise lj.RequestError(
            f"--base={base} is for adapters in PEFT's format; {path} knows its own"
        )
    from lora_jax.analysis.trained import factors_of, kernels_of

    adapted = lj.load_adapter(path)
    model, method, trainable = adapted.model, adapted.method, adapted.trainable
    adapter = factors_of(method, trainable, model.params, name=name)
    adapter = dataclasses.replace(adapter, base=f"{model.name} ({model.base_hash[:12]})")
    kernels = kernels_of(method, trainable, model.params)
    return _Loaded(adapter, kernels, adapted.description["seed"])


def _shared_starts(loaded: Sequence[_Loaded]) -> list[str]:
    """Runs of one seed: what their `a` have in common need not be learned."""
    of_seed: dict[int, list[str]] = {}
    for one in loaded:
        if one.seed is not None:
            of_seed.setdefault(one.seed, []).append(one.adapter.name)
    return [
        f"{' and '.join(some)} have the same seed, {seed}, so that their `a` began with the same "
        "columns: part of what they share is that start. Compare runs of different seeds, or take "
        "the start out first (lj.analysis.remove_directions)."
        for seed, some in of_seed.items()
        if len(some) > 1
    ]


def _check_directions(directions: int | None, adapters: Sequence[AdapterFactors]) -> None:
    if directions is None:
        return
    if len(adapters) < 2:
        raise lj.RequestError(
            f"--directions={directions} is of the similarity of two adapters, and there is one; "
            "name another"
        )
    most = max(one.rank for adapter in adapters for one in adapter.factors.values())
    if not 1 <= directions <= most:
        raise lj.RequestError(
            f"--directions={directions}; the adapters have 1 to {most}, their largest rank"
        )


def _notes_on_adapters(adapters: Sequence[AdapterFactors]) -> list[str]:
    notes = [
        f"{adapter.name}: {len(adapter.skipped)} convolutions are left out; only matrices are "
        "analysed."
        for adapter in adapters
        if adapter.skipped
    ]
    if len({adapter.base for adapter in adapters if adapter.base}) > 1:
        notes.append(
            "The adapters name different bases: "
            + "; ".join(f"{adapter.name} {adapter.base or 'none'}" for adapter in adapters)
            + ". Directions of different models have no common meaning, even where shapes agree."
        )
    notes += [_note_on_dora(adapter) for adapter in adapters if adapter.is_dora]
    return notes


def _note_on_dora(adapter: AdapterFactors) -> str:
    if any(one.gain is not None for one in adapter.factors.values()):
        return (
            f"{adapter.name} is DoRA: ΔW is its low-rank part times the gain m / ‖W + ΔW‖ of each "
            "output. The gain scales W's own columns, too, which is no change of low rank and not "
            "in ΔW."
        )
    has_norms = any(one.magnitude is not None for one in adapter.factors.values())
    return (
        f"{adapter.name} is DoRA: what is shown is its low-rank part, without the gain that scales "
        f"the columns of W + ΔW{', which needs W: give --base' if has_norms else ''}."
    )


def _notes_on_pairs(pairs: Sequence[Pair]) -> list[str]:
    from lora_jax.report.adapters import MAX_PAIRS

    if len(pairs) > MAX_PAIRS:
        apart = [pair for pair in pairs if pair.unlike or pair.alone]
        start = _notes_on_pairs(apart[:1])
        more = f"Of {len(pairs)} pairs {len(apart)} do not change the same matrices; the first: "
        return [more + note for note in start]
    notes = []
    for pair in pairs:
        both = f"{pair.first} and {pair.second}"
        if pair.unlike:
            notes.append(
                f"{both}: {len(pair.unlike)} matrices of one name have different shapes "
                f"({pair.unlike[0]}, for one); they are of different bases and are left out."
            )
        elif not pair.profiles:
            notes.append(
                f"{both} have no common matrix, so there is nothing to compare: the first ones are "
                f"{', '.join(pair.alone[:3])}."
            )
        elif pair.alone:
            notes.append(f"{both}: {len(pair.alone)} matrices are changed by one alone.")
    return notes


def _print(analysis: Analysis) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lora_jax.report.adapters import headline, summary_table

    console = Console(width=None if sys.stdout.isatty() else 110)
    for name, profiles in analysis.profiles.items():
        table = Table(title=Text(name), title_justify="left")
        head, *lines = summary_table(profiles)
        for number, title in enumerate(head):
            table.add_column(title, justify="right" if number else "left", overflow="fold")
        for line in lines:
            table.add_row(*map(Text, line))
        console.print(table)
    for line in (*headline(analysis), *(f"Note: {note}" for note in analysis.notes)):
        console.print(Text(line))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, where somebody looks; called with each matrix, which takes a while."""
    if not sys.stderr.isatty():
        yield lambda module: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    with bar:
        task = bar.add_task("", total=total)
        yield lambda module: bar.update(task, advance=1, description=module[-48:])
