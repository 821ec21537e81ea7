"""The training progress of a cell, apart from its arrays; saved with every checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Any

CHANGED_TO = ", then "
STOPPED_IMPROVING = "validation stopped improving"


@dataclasses.dataclass(frozen=True)
class Bookkeeping:
    """All plain values, so that it goes through JSON unchanged.

    `window` holds the steps not logged yet, as (step, loss, correct, weight, grad_norm); `seconds`
    what each kind of work took; `metrics_lines` how many lines of the metrics file are true;
    `stopped` why the training is over, "" while it is not; `meshes` those it was on, in order;
    `numerics_changes` what of `train/numerics.py` changed on the way.
    """

    step: int = 0
    evaluated_step: int = 0
    best_step: int = 0
    best_loss: float | None = None
    best_accuracy: float | None = None
    evaluations_since_best: int = 0
    window: tuple[tuple[float, ...], ...] = ()
    train_loss: float | None = None
    metrics_lines: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    stopped: str = ""
    meshes: tuple[str, ...] = ()
    numerics_changes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Bookkeeping:
        window = tuple(tuple(row) for row in values["window"])
        lists = {name: tuple(values.get(name, ())) for name in ("meshes", "numerics_changes")}
        return cls(**{**values, "window": window, **lists})

    def with_changes(self, changes: tuple[str, ...]) -> Bookkeeping:
        """The progress of a training that goes on with other `numerics`."""
        if not changes:
            return self
        return dataclasses.replace(self, numerics_changes=(*self.numerics_changes, *changes))

    def on_mesh(self, mesh: str) -> Bookkeeping:
        """The progress of a training that goes on on `mesh`, "" for one device."""
        if self.meshes[-1:] == (mesh,):
            return self
        return dataclasses.replace(self, meshes=(*self.meshes, mesh))

    @property
    def mesh(self) -> str:
        """Where the training was, for its card: "" if it never was on more than one device."""
        if self.meshes in ((), ("",)):
            return ""
        return CHANGED_TO.join(mesh or "one device" for mesh in self.meshes)

    def after_logging(self) -> tuple[Bookkeeping, dict[str, float]]:
        """The progress with the window emptied, and its means: loss, accuracy, grad_norm.

        Loss and accuracy are means over examples, the norm over steps.
        """
        weight = max(sum(row[3] for row in self.window), 1e-9)
        loss = sum(row[1] * row[3] for row in self.window) / weight
        values = {
            "loss": loss,
            "accuracy": sum(row[2] for row in self.window) / weight,
            "grad_norm": sum(row[4] for row in self.window) / len(self.window),
        }
        return dataclasses.replace(self, train_loss=loss, window=()), values

    def after_evaluation(
        self, loss: float, accuracy: float, *, patience: int, num_steps: int
    ) -> Bookkeeping:
        """The progress after an evaluation at the current step: best so far, and whether to stop.

        `patience` counts evaluations without a better loss, 0 for no limit.
        """
        if self.best_loss is None or loss < self.best_loss:
            better = {"best_step": self.step, "best_loss": loss, "best_accuracy": accuracy}
            after = dataclasses.replace(self, evaluations_since_best=0, **better)
        else:
            since = self.evaluations_since_best + 1
            after = dataclasses.replace(self, evaluations_since_best=since)
        stopped = ""
        if patience and after.evaluations_since_best >= patience:
            stopped = STOPPED_IMPROVING
        elif self.step >= num_steps:
            stopped = f"budget of {num_steps} steps ended"
        return dataclasses.replace(after, evaluated_step=self.step, stopped=stopped)
