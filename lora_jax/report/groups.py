"""Which runs are repeats of one another, and which learning rate speaks for each method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lora_jax.methods.registry import METHODS, settings_of, title_of
from lora_jax.report.runs import FinishedRun, Run, finished_runs
from lora_jax.settings.settings import hashable_settings

BASIN_MARGIN = 0.01  # nats of validation loss within which a rate counts as good as the best

_SEEDS = ("seed", "data.seed")
# What may differ without making another experiment of it.
_BOOKKEEPING = ("train.log_every_steps", "train.checkpoint_every_steps", "train.eval_batch_size")
_BOOKKEEPING_SECTIONS = ("workdir", "name", "mesh", "logging")
# What a config may hold for a method that has no use for it.
_OF_ADAPTERS = ("targets", "rank", "alpha", "dropout", "init")
_NAMED = ("method.name", "method.targets", "method.rank", "optimizer.lr")


@dataclass(frozen=True)
class Group:
    """Finished runs that differ by seed only, in order of seed."""

    settings: dict[str, Any]
    runs: tuple[FinishedRun, ...]
    label: str = ""

    @property
    def method(self) -> str:
        """The method's name in the config, e.g. "lora"."""
        return self.settings["method.name"]

    @property
    def method_name(self) -> str:
        """The method's name for readers, e.g. "LoRA"."""
        return title_of(self.method)

    @property
    def lr(self) -> float | None:
        """The peak learning rate."""
        return self.settings.get("optimizer.lr")

    @property
    def seeds(self) -> tuple[tuple[int, int], ...]:
        """(seed, data seed) of each run; runs of two groups pair up where these are equal."""
        return tuple(_seed(run) for run in self.runs)

    @property
    def data(self) -> tuple[str, str]:
        """Hashes of the base weights and of the data: only runs that share both compare."""
        card = self.runs[0].card
        return card.base_hash, card.data_hash

    @property
    def validation_loss(self) -> float:
        """Mean over seeds of the best validation loss; inf where a run diverged."""
        return _validation_loss(self.runs)


@dataclass(frozen=True)
class Basin:
    """How validation loss depends on the learning rate, for one method.

    rates are ascending; losses are means over the seeds every rate was run with (inf: diverged);
    seed_losses holds each run's. [low, high] is the stretch of rates around the chosen one whose
    loss is within BASIN_MARGIN of the best.
    """

    label: str
    method: str
    rates: tuple[float, ...]
    losses: tuple[float, ...]
    seed_losses: tuple[tuple[float, ...], ...]
    chosen: float
    low: float
    high: float

    @property
    def at_edge(self) -> bool:
        """Whether the chosen rate is the smallest or largest tried: a better may lie beyond."""
        return self.chosen in (self.rates[0], self.rates[-1])


def group_runs(runs: list[Run]) -> tuple[list[Group], list[str]]:
    """Groups finished runs by everything but the seed; also says which repeats it left out.

    Runs on different data or base weights never share a group.
    """
    groups: dict[str, list[FinishedRun]] = {}
    settings, warnings = {}, []
    for run in finished_runs(runs):
        kept = _settings(run.config)
        key = repr((sorted(kept.items()), run.card.base_hash, run.card.data_hash))
        settings[key] = kept
        twin = next((r for r in groups.get(key, []) if _seed(r) == _seed(run)), None)
        if twin is None:
            groups.setdefault(key, []).append(run)
        else:
            warnings.append(
                f"{run.name} repeats {twin.name} (same settings, same seed): counted once"
            )
    ordered = [
        Group(settings[key], tuple(sorted(members, key=_seed))) for key, members in groups.items()
    ]
    return ordered, warnings


def choose_rates(groups: list[Group]) -> tuple[list[Group], list[Basin]]:
    """Keeps, of groups that differ by learning rate only, the one with the best validation loss.

    Rates are compared on the seeds that all of them were run with (on all runs where they share
    none). The test split has no say. Returned groups carry labels that tell them apart and stand
    in order of how much they train.
    """
    families: dict[str, list[Group]] = {}
    for group in groups:
        rest = {k: v for k, v in group.settings.items() if k != "optimizer.lr"}
        families.setdefault(repr((sorted(rest.items()), group.data)), []).append(group)
    chosen, tuned = [], []
    for family in families.values():
        family = sorted(family, key=lambda group: math.inf if group.lr is None else group.lr)
        shared = set.intersection(*(set(group.seeds) for group in family))
        losses = [
            _validation_loss([r for r in group.runs if not shared or _seed(r) in shared])
            for group in family
        ]
        best = int(np.argmin(losses))
        chosen.append(family[best])
        tuned.append((family, losses, best))
    order = _order(chosen)
    labels = _labels([chosen[i] for i in order])
    groups = [replace(chosen[i], label=label) for i, label in zip(order, labels, strict=True)]
    basins = [
        _basin(label, *tuned[i])
        for i, label in zip(order, labels, strict=True)
        if len(tuned[i][0]) > 1
    ]
    return groups, basins


def differing_settings(groups: list[Group]) -> list[str]:
    """Settings that are not the same in all groups, the four that have a column left aside."""
    keys = {key for group in groups for key in group.settings} - set(_NAMED)
    return sorted(
        key for key in keys if len({repr(g.settings[key]) for g in groups if key in g.settings}) > 1
    )


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    flat = hashable_settings(config)
    dropped = {*_SEEDS, *_BOOKKEEPING}
    if kind := METHODS.get(str(flat.get("method.name"))):
        own = settings_of(kind)
        dropped |= {f"method.{name}" for name in _OF_ADAPTERS if name not in own}
    return {
        key: value
        for key, value in flat.items()
        if key not in dropped and key.split(".")[0] not in _BOOKKEEPING_SECTIONS
    }


def _seed(run: Run) -> tuple[int, int]:
    flat = hashable_settings(run.config)
    return flat.get("seed") or 0, flat.get("data.seed") or 0


def _validation_loss(runs: Sequence[FinishedRun]) -> float:
    mean = float(np.mean([run.card.metrics.validation.loss for run in runs]))
    return mean if math.isfinite(mean) else math.inf


def _order(groups: list[Group]) -> list[int]:
    """Positions by trained parameters, from the head to everything; a method's ranks together."""
    counts = [group.runs[0].card.counts.adapter for group in groups]
    kinds = [(group.method, str(group.settings.get("method.targets"))) for group in groups]
    smallest = {
        kind: min(c for c, k in zip(counts, kinds, strict=True) if k == kind) for kind in kinds
    }
    return sorted(
        range(len(groups)),
        key=lambda i: (smallest[kinds[i]], kinds[i], counts[i], repr(groups[i].settings)),
    )


def _basin(label: str, family, losses, best: int) -> Basin:
    low = high = best
    good = losses[best] + BASIN_MARGIN
    while low > 0 and losses[low - 1] <= good:
        low -= 1
    while high < len(losses) - 1 and losses[high + 1] <= good:
        high += 1
    rates = tuple(group.lr for group in family)
    return Basin(
        label=label,
        method=family[0].method,
        rates=rates,
        losses=tuple(losses),
        seed_losses=tuple(
            tuple(run.card.metrics.validation.loss for run in group.runs) for group in family
        ),
        chosen=rates[best],
        low=rates[low],
        high=rates[high],
    )


def _labels(groups: list[Group]) -> list[str]:
    """A short name for each group; where two share one, what tells them apart is added."""
    short = [_short_label(group) for group in groups]
    labels = []
    for group, label in zip(groups, short, strict=True):
        namesakes = [g for g, other in zip(groups, short, strict=True) if other == label]
        extra = [
            f"{key.split('.')[-1]}={group.settings[key]}"
            for key in differing_settings(namesakes)
            if key in group.settings
        ]
        for name, place in (("base", 0), ("data", 1)):
            if len({g.data[place] for g in namesakes}) > 1:
                extra.append(f"{name} {group.data[place][:8]}")
        labels.append(f"{label} ({', '.join(extra)})" if extra else label)
    return labels


def _short_label(group: Group) -> str:
    targets, rank = group.settings.get("method.targets"), group.settings.get("method.rank")
    parts = [group.method_name]
    if targets:
        parts.append(str(targets))
    if rank is not None:
        parts.append(f"r={rank}")
    kind = METHODS.get(group.method)
    if (dim := group.settings.get("method.dim")) and kind and "dim" in settings_of(kind):
        parts.append(f"d={dim}")
    return " ".join(parts)
