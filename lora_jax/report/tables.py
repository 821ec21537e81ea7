"""What a working folder's runs amount to: one row per method, with intervals and differences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.methods.lora import LoRA
from lora_jax.methods.registry import METHODS
from lora_jax.report.groups import Basin, Group, choose_rates, differing_settings, group_runs
from lora_jax.report.runs import FinishedRun, Predictions, Run, finished_runs
from lora_jax.report.statistics import (
    NUM_RESAMPLES,
    Interval,
    mean_interval,
    paired_difference,
    spread_over_weights,
)
from lora_jax.train.task import NEAR
from lora_jax.train.task_metrics import TASK_METRICS

REFERENCES = ("full", "head")


@dataclass(frozen=True)
class Row:
    """One method at its chosen learning rate, over its seeds.

    Losses in nats, accuracies and their differences as fractions, times in seconds, adapter_bytes
    in bytes; counts are of trained parameters. memory_bytes is what the largest program of any run
    held (None on cards that do not say), cells how many trained as one program with each run; a
    packed run's seconds are its share. An interval is None where the predictions it needs
    are not there; versus holds, per reference in REFERENCES, this row's accuracy minus the
    reference's on the same examples (None for the reference itself). loss_vs_lora is a variant's
    test loss minus that of plain LoRA on the same targets, on the same examples. task_metrics are
    the means over seeds of what else a data set is judged by; is_regression says that "accuracy" is
    the share of numbers close to their labels.
    """

    label: str
    method: str
    method_name: str
    targets: str | None
    rank: int | None
    lr: float | None
    rates_tried: int
    differing: dict[str, object]
    seeds: tuple[int, ...]
    adapter_count: int
    head_count: int
    adapter_bytes: int | None
    validation_loss: float
    loss: Interval | None
    accuracy: Interval | None
    seed_losses: tuple[float, ...]
    seed_accuracies: tuple[float, ...]
    versus: dict[str, Interval | None]
    loss_vs_lora: Interval | None
    task_metrics: dict[str, float]
    is_regression: bool
    num_examples: int
    steps: tuple[int, ...]
    stopped: tuple[str, ...]
    seconds: float
    memory_bytes: int | None
    cells: tuple[int, ...]
    runs: tuple[FinishedRun, ...]

    @property
    def test_loss(self) -> float:
        """Mean test loss over seeds."""
        return self.loss.estimate if self.loss else float(np.mean(self.seed_losses))

    @property
    def test_accuracy(self) -> float:
        """Mean test accuracy over seeds."""
        return self.accuracy.estimate if self.accuracy else float(np.mean(self.seed_accuracies))

    def score(self, name: str) -> tuple[float, Interval | None]:
        """The test "loss", or the test "accuracy" in percent, and its interval."""
        if name == "loss":
            return self.test_loss, self.loss
        return 100 * self.test_accuracy, self.accuracy and self.accuracy.scaled(100)


class ScoreNames(NamedTuple):
    """What the two scores of every run are called: `loss` with its unit, and `accuracy`."""

    loss: str
    accuracy: str


def score_names(rows: Sequence[Row]) -> ScoreNames:
    """The names that hold for all rows; in regression "accuracy" is the share close to labels."""
    if rows and all(row.is_regression for row in rows):
        return ScoreNames("squared error", f"share within {NEAR}")
    if any(row.is_regression for row in rows):
        return ScoreNames("cross-entropy (nats) or squared error", "accuracy")
    return ScoreNames("cross-entropy (nats)", "accuracy")


@dataclass(frozen=True)
class Summary:
    """The rows of a report, what they were chosen from, and warnings for the reader."""

    rows: tuple[Row, ...]
    basins: tuple[Basin, ...]
    runs: tuple[Run, ...]
    warnings: tuple[str, ...]
    num_resamples: int

    @property
    def unfinished(self) -> tuple[Run, ...]:
        """Runs without a card: still going, or ended before their time."""
        return tuple(run for run in self.runs if not run.finished)

    @property
    def references(self) -> tuple[str, ...]:
        """The references that at least one row is compared with."""
        return tuple(r for r in REFERENCES if any(row.versus[r] for row in self.rows))


def summarise(runs: list[Run], *, seed: int = 0, num_resamples: int = NUM_RESAMPLES) -> Summary:
    """Groups the runs by method, chooses learning rates on validation, and measures on test.

    Args:
      runs: as `read_runs` gives them; unfinished ones are carried along, not measured.
      seed, num_resamples: of the bootstrap (see `statistics`).

    Raises:
      RequestError: runs said to share their data were scored on different test examples.
    """
    groups, warnings = group_runs(runs)
    chosen, basins = choose_rates(groups)
    differing = differing_settings(chosen)
    rates = {basin.label: len(basin.rates) for basin in basins}
    rows = tuple(
        _row(group, chosen, differing, rates.get(group.label, 1), seed, num_resamples)
        for group in chosen
    )
    for basin in basins:
        if basin.at_edge:
            warnings.append(
                f"{basin.label}: the best learning rate, {basin.chosen:g}, is at the edge of those "
                f"tried ({basin.rates[0]:g} to {basin.rates[-1]:g}); a better one may lie beyond"
            )
    if len({group.data for group in chosen}) > 1:
        warnings.append(
            "runs on different data or base weights stand in one table; differences are given "
            "only between runs that share both"
        )
    for run in finished_runs(runs):
        warnings.extend(_disagreements(run))
    return Summary(rows, tuple(basins), tuple(runs), tuple(warnings), num_resamples)


def _row(group: Group, groups, differing, rates_tried: int, seed: int, num_resamples: int) -> Row:
    card = group.runs[0].card
    targets = group.settings.get("method.targets")
    predictions = _predictions(group)
    drawn = {"seed": seed, "num_resamples": num_resamples}
    intervals = {
        quantity: mean_interval(_scores(predictions, quantity), **drawn) if predictions else None
        for quantity in ("loss", "correct")
    }
    measured = [run.card.metrics.test.task_metrics for run in group.runs]
    return Row(
        label=group.label,
        method=group.method,
        method_name=group.method_name,
        targets=None if targets is None else str(targets),
        rank=group.settings.get("method.rank"),
        lr=group.lr,
        rates_tried=rates_tried,
        differing={key: group.settings[key] for key in differing if key in group.settings},
        seeds=tuple(seed for seed, _ in group.seeds),
        adapter_count=card.counts.adapter,
        head_count=card.counts.head,
        adapter_bytes=card.metrics.adapter_bytes,
        validation_loss=group.validation_loss,
        loss=intervals["loss"],
        accuracy=intervals["correct"],
        seed_losses=tuple(run.card.metrics.test.loss for run in group.runs),
        seed_accuracies=tuple(run.card.metrics.test.accuracy for run in group.runs),
        versus={
            name: _difference("correct", group, _reference(name, group, groups), **drawn)
            for name in REFERENCES
        },
        loss_vs_lora=_difference("loss", group, _plain_lora(group, groups), **drawn),
        task_metrics={
            name: float(np.mean([one[name] for one in measured]))
            for name in TASK_METRICS
            if all(name in one for one in measured)
        },
        is_regression=group.settings.get("model.head") == "regression",
        num_examples=len(predictions[0].index) if predictions else 0,
        steps=tuple(run.card.metrics.steps for run in group.runs),
        stopped=tuple(run.card.metrics.stopped for run in group.runs),
        seconds=float(np.mean([run.card.seconds.total for run in group.runs])),
        memory_bytes=max(
            filter(None, (run.card.program.memory_bytes for run in group.runs)), default=None
        ),
        cells=tuple(run.card.program.K for run in group.runs),
        runs=group.runs,
    )


def _predictions(group: Group) -> list[Predictions] | None:
    """Each run's predictions of the same test examples, or None where a run has none."""
    found = [run.predictions for run in group.runs if run.predictions is not None]
    if len(found) < len(group.runs):
        return None
    for run, one in zip(group.runs, found, strict=True):
        if not np.array_equal(one.index, found[0].index):
            raise RequestError(
                f"{run.folder} and {group.runs[0].folder} have one data hash and different test "
                "examples; evaluate one of them again"
            )
    return found


def _scores(predictions: Sequence[Predictions], quantity: str) -> np.ndarray:
    """(S, N) scores on the test examples."""
    return np.stack([spread_over_weights(getattr(p, quantity), p.weight) for p in predictions])


def _reference(name: str, group: Group, groups) -> Group | None:
    """The reference on the same base weights and data; of several, the best on validation."""
    if group.method == name:
        return None
    candidates = [g for g in groups if g.method == name and g.data == group.data]
    return min(candidates, key=lambda g: g.validation_loss, default=None)


def _plain_lora(group: Group, groups) -> Group | None:
    """Plain LoRA on a variant's targets, base weights and data; of several, the best there."""
    if not issubclass(METHODS.get(group.method, object), LoRA):
        return None
    targets = group.settings.get("method.targets")
    candidates = [g for g in groups if g.settings.get("method.targets") == targets]
    return _reference("lora", group, candidates)


def _difference(
    quantity: str, group: Group, other: Group | None, *, seed: int, num_resamples: int
) -> Interval | None:
    if other is None or not (ours := _predictions(group)) or not (theirs := _predictions(other)):
        return None
    return paired_difference(
        _scores(ours, quantity),
        _scores(theirs, quantity),
        first_index=ours[0].index,
        second_index=theirs[0].index,
        first_seeds=group.seeds,
        second_seeds=other.seeds,
        seed=seed,
        num_resamples=num_resamples,
    )


def _disagreements(run: FinishedRun) -> list[str]:
    """Says where a card's test metrics are not the mean of its predictions."""
    if run.predictions is None:
        return [f"{run.name}: no test_predictions.npz, so no intervals for its row"]
    test = run.card.metrics.test
    pairs = {
        "loss": (test.loss, run.predictions.mean("loss")),
        "accuracy": (test.accuracy, run.predictions.mean("correct")),
    }
    return [
        f"{run.name}: card.json says test {name} {in_card:.6g}, its predictions say {value:.6g}; "
        "the table follows the predictions"
        for name, (in_card, value) in pairs.items()
        if not np.isclose(in_card, value, rtol=1e-4, atol=1e-6, equal_nan=True)
    ]
