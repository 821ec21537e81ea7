"""The cells of a sweep: those that `sweep_NAME(add)`, next to a config's `get_config`, adds."""

from __future__ import annotations

import dataclasses
import itertools
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.settings import Settings, complete
from lora_jax.settings.config import run_file
from lora_jax.train.cell import Cell as Cell
from lora_jax.train.workdir import LONGEST_NAME, is_folder_name

PREFIX = "sweep_"
MIN_VALUES = 2


@dataclasses.dataclass(frozen=True)
class Tuning:
    """One arm, tuned: cells for each point of a grid, then more seeds with the best point.

    `keys` are the settings of the grid and `points` their values together, in order. `seeds` are
    those that choose, each with every point, under the settings `tune_with`; `config` is the arm's,
    without a point.
    """

    name: str
    keys: tuple[str, ...]
    points: tuple[tuple[Any, ...], ...]
    config: Settings
    seeds: tuple[int, ...]
    more_seeds: tuple[int, ...] = ()
    tune_with: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def cell(self, point: tuple[Any, ...], seed: int, *, tuning: bool = False) -> Cell:
        """The cell of one point: `NAME-lr0.001-s0`."""
        own = dict(zip(self.keys, point, strict=True))
        texts = (f"-{key.rpartition('.')[2]}{value_text(value)}" for key, value in own.items())
        more = self.tune_with if tuning else {}
        config = self.config.replace({**more, **own, "seed": seed})
        return Cell(f"{self.name}{''.join(texts)}-s{seed}", config)

    @property
    def first(self) -> list[Cell]:
        """The cells that the choice is made from, the seeds of a point together."""
        return [self.cell(point, s, tuning=True) for point in self.points for s in self.seeds]

    def more(self, point: tuple[Any, ...]) -> list[Cell]:
        """The cells of the other seeds at the chosen point."""
        return [self.cell(point, seed) for seed in self.more_seeds]

    @property
    def possible(self) -> list[Cell]:
        """Those of `first`, and each that the choice may lead to."""
        return [*self.first, *(cell for point in self.points for cell in self.more(point))]


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A named sweep: its plain cells, and the arms that are tuned."""

    name: str
    cells: tuple[Cell, ...]
    tunings: tuple[Tuning, ...] = ()

    @property
    def first(self) -> list[Cell]:
        """All cells that are known before any has run."""
        return [*self.cells, *(cell for tuning in self.tunings for cell in tuning.first)]

    def choosing(self) -> Sweep:
        """The same, which stops once the values are chosen: before any other seed runs."""
        tunings = (dataclasses.replace(tuning, more_seeds=()) for tuning in self.tunings)
        return dataclasses.replace(self, tunings=tuple(tunings))

    def only(self, text: str) -> Sweep:
        """The cells whose name contains `text`.

        An arm all of whose cells do is tuned; of one where only some do, these run, and nothing is
        chosen. Raises `RequestError` where no name contains it.
        """
        cells = tuple(cell for cell in self.cells if text in cell.name)
        whole = [t for t in self.tunings if all(text in cell.name for cell in t.first)]
        some = [c for t in self.tunings if t not in whole for c in t.first if text in c.name]
        chosen = Sweep(self.name, (*cells, *some), tuple(whole))
        if not chosen.first:
            names = [cell.name for cell in self.first]
            raise RequestError(f"no cell's name contains {text!r}; there are {names[:8]}")
        return chosen


def read_sweep(path: str, sweep: str, config: Settings) -> Sweep:
    """Calls `sweep_<sweep>(add)` of the config file `path`; each `add` is `config` overridden.

    `add(name, **{"method.rank": 4, "seed": 1})` adds a cell. `add(name, tune=("optimizer.lr",
    rates), more_seeds=(1, 2), …)` adds a tuned arm: a cell for each rate, and when all have
    ended, the rate with the best validation loss runs with the other seeds too. `tune` may name
    several settings, `{"optimizer.lr": rates, "optimizer.head_lr": more}`: all combinations.
    `tune_seeds=(100, 101)` choose by the mean of their losses, in the place of the config's seed,
    so that no seed is reported that chose; `tune_with` are settings of the cells that choose alone
    (`{"data.eval_limit": 1000}`). Raises `RequestError` for a sweep the file does not have, a name
    given twice, two cells with the same settings, or a setting the config does not know.
    """
    config = complete(config)
    functions = run_file(path)
    known = [name.removeprefix(PREFIX) for name in functions if name.startswith(PREFIX)]
    if sweep not in known:
        raise RequestError(f"{path} has no sweep {sweep!r}; {nearest(sweep, known)}")
    cells: list[Cell] = []
    tunings: list[Tuning] = []

    def add(
        name: str,
        *,
        tune=None,
        more_seeds: Iterable[int] = (),
        tune_seeds: Iterable[int] = (),
        tune_with: Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> None:
        taken = {cell.name for cell in cells} | {tuning.name for tuning in tunings}
        if name in taken:
            raise RequestError(f"sweep {sweep!r} adds the cell {name!r} twice; name them apart")
        _check_name(name)
        made = config.replace(overrides)
        seeds = _seeds(name, "more_seeds", more_seeds)
        choosing = _seeds(name, "tune_seeds", tune_seeds)
        if tune is not None:
            tunings.append(_tuning(name, tune, made, choosing or (made.seed,), seeds, tune_with))
        elif seeds or choosing or tune_with:
            lone = "more_seeds" if seeds else "tune_seeds" if choosing else "tune_with"
            raise RequestError(f"cell {name!r}: {lone} needs tune; or add a cell for each seed")
        else:
            cells.append(Cell(name, made))

    functions[PREFIX + sweep](add)
    found = Sweep(sweep, tuple(cells), tuple(tunings))
    if not found.first:
        raise RequestError(f"sweep {sweep!r} of {path} adds no cell")
    _refuse_twins(found)
    return found


def _tuning(
    name: str,
    tune: Any,
    config: Settings,
    choosing: tuple[int, ...],
    more_seeds: tuple[int, ...],
    tune_with: Mapping[str, Any] | None,
) -> Tuning:
    try:
        grid = [read_tune(own) for own in (tune.items() if isinstance(tune, Mapping) else [tune])]
        _check_tune_with(tune_with or {}, config, [key for key, _ in grid])
    except RequestError as error:
        raise RequestError(f"cell {name!r}: {error}") from None
    if not grid:
        raise RequestError(f"cell {name!r}: tune is empty; give a setting and its values")
    seeds = (*choosing, *more_seeds)
    if len(set(seeds)) < len(seeds):
        raise RequestError(f"cell {name!r}: the seeds {seeds} repeat one; name each once")
    keys, values = zip(*grid, strict=True)
    points = tuple(itertools.product(*values))
    return Tuning(name, keys, points, config, choosing, more_seeds, dict(tune_with or {}))


def _check_tune_with(tune_with: Any, config: Settings, tuned: Sequence[str]) -> None:
    if not isinstance(tune_with, Mapping):
        raise RequestError(
            f'tune_with is {tune_with!r}; give settings: {{"data.eval_limit": 1000}}'
        )
    if taken := [key for key in ("seed", *tuned) if key in tune_with]:
        raise RequestError(f"tune_with sets {taken[0]!r}, which the tuning sets; leave it out")
    config.replace(tune_with)  # for the check of names and values


def read_tune(tune: Any) -> tuple[str, tuple[Any, ...]]:
    """`(setting, values)`: two or more different numbers or texts. Raises `RequestError`."""
    try:
        key, values = tune
        values = tuple(values) if not isinstance(values, str) else None
    except (TypeError, ValueError):
        values = None
    if not values or not isinstance(key, str):
        raise RequestError(
            f'tune is {tune!r}; give a setting and its values: ("optimizer.lr", (1e-4, 1e-3))'
        )
    for value in values:
        if not isinstance(value, int | float | str):
            raise RequestError(f"tune has the value {value!r}; give numbers or texts")
    if len({value_text(value) for value in values}) < max(MIN_VALUES, len(values)):
        raise RequestError(
            f"tune has the values {values}; give {MIN_VALUES} or more, all different in their "
            "first six digits"
        )
    return key, values


def value_text(value: Any) -> str:
    """A value as it stands in a cell's name."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _seeds(name: str, what: str, given: Any) -> tuple[int, ...]:
    seeds = tuple(given) if isinstance(given, Iterable) else given
    if not isinstance(seeds, tuple) or not all(type(seed) is int for seed in seeds):
        raise RequestError(f"cell {name!r}: {what} is {seeds}; give whole numbers: (1, 2)")
    return seeds


def _check_name(name: Any) -> None:
    if not is_folder_name(name):
        raise RequestError(
            f"cell name {reprlib.repr(name)} cannot be a folder's; use letters, digits and -, "
            f"{LONGEST_NAME} bytes at most"
        )


def _refuse_twins(sweep: Sweep) -> None:
    """Raises `RequestError` where two cells, first or possible, share a name or their settings."""
    names: set[str] = set()
    hashes: dict[str, str] = {}
    for cell in [*sweep.cells, *(cell for tuning in sweep.tunings for cell in tuning.possible)]:
        _check_name(cell.name)
        if cell.name in names:
            raise RequestError(
                f"sweep {sweep.name!r}: two cells are named {cell.name!r}, one of them by a tune; "
                "rename one"
            )
        twin = hashes.setdefault(cell.hash, cell.name)
        if twin != cell.name:
            raise RequestError(
                f"sweep {sweep.name!r}: cells {twin!r} and {cell.name!r} have the same settings; "
                "remove one, or give them different seeds"
            )
        names.add(cell.name)


def choose_value(tuning: Tuning, losses: Sequence[float]) -> dict[str, Any]:
    """What a tuning found, as JSON values: the basin, and the value with the lowest loss.

    `losses` are the best validation losses of the cells of `tuning.first`, inf where one failed; a
    point has the mean over its seeds. With several settings `key`, `values` and `chosen` are lists;
    `seed` is one where the seeds that choose are the arm's own `tune_seeds`.
    """
    count = len(tuning.seeds)
    means = [sum(losses[n : n + count]) / count for n in range(0, len(losses), count)]
    best = tuning.points[min(range(len(means)), key=means.__getitem__)]
    edges = zip(best, zip(*tuning.points, strict=True), strict=True)
    plain, own_seeds = len(tuning.keys) == 1, tuning.seeds != (tuning.config.seed,)
    found = {
        "key": tuning.keys[0] if plain else list(tuning.keys),
        "values": [point[0] if plain else list(point) for point in tuning.points],
        "validation_losses": means,
        "seed": list(tuning.seeds) if own_seeds else tuning.config.seed,
        "chosen": best[0] if plain else list(best),
        "at_edge": any(is_at_edge(chosen, values) for chosen, values in edges),
    }
    return found | {"by_seed": _rows(losses, count)} if own_seeds else found


def _rows(values: Sequence[float], count: int) -> list[list[float]]:
    return [list(values[n : n + count]) for n in range(0, len(values), count)]


def best_point(tuning: Tuning, choice: Mapping[str, Any]) -> tuple[Any, ...] | None:
    """The point that `choose_value` chose; None where every one failed."""
    if not any(map(math.isfinite, choice["validation_losses"])):
        return None
    chosen = choice["chosen"]
    return tuple(chosen) if len(tuning.keys) > 1 else (chosen,)


def is_at_edge(chosen: Any, values: Sequence[Any]) -> bool:
    """Whether the best of some numbers is their smallest or largest; texts have no edge."""
    if any(isinstance(value, str) for value in values):
        return False
    return chosen in (min(values), max(values))
