"""A cell, the schedule that cells of one training share, and a cell's training progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.methods import Method
from lora_jax.settings import Settings

CHANGED_TO = ", then "
STOPPED_IMPROVING = "validation stopped improving"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: its name in a workdir or a sweep, and its settings.

    `made` is its method and `num_steps` its length, once they are known; `refused` says why it
    cannot run; `shown` has what the results of `lj.sweep` show of its settings.
    """

    name: str
    config: Settings
    made: Method | None = None
    num_steps: int = 0
    refused: RequestError | None = None
    shown: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def method(self) -> Method:
        """The method, made for the cell's base."""
        assert self.made is not None
        return self.made

    @property
    def lr(self) -> float:
        """The peak learning rate."""
        return self.config.optimizer.lr

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def hash(self) -> str:
        """The config's hash."""
        return self.config.hash


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What all cells of a training share: its length, the intervals in steps, and the patience.

    `eval_every` of 0 evaluates once, after the last step; `checkpoint_every` of 0 never saves;
    `patience` counts evaluations without a better loss, 0 for no limit; `target_loss` is the
    validation loss (nats) at which a cell has learned enough, 0 for none.
    """

    num_steps: int
    eval_every: int
    patience: int
    log_every: int = 50
    checkpoint_every: int = 0
    target_loss: float = 0.0


@dataclasses.dataclass
class Progress:
    """The training progress of a cell, apart from its arrays; saved with every checkpoint.

    All plain values, so that it goes through JSON unchanged. `window` holds the steps not logged
    yet, as (step, loss, correct, weight, grad_norm); `seconds` what each kind of work took,
    `logged_seconds` those of training at the last log; `metrics_lines` how many lines of the
    metrics file are true; `stopped` why the training is over, "" while it is not; `meshes` those it
    was on, in order; `numerics_changes` what of `numerics` changed on the way.
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
    logged_seconds: float = 0.0
    stopped: str = ""
    meshes: tuple[str, ...] = ()
    numerics_changes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any], changes: tuple[str, ...] = ()) -> Progress:
        """What `to_json` gave; `changes` are those of `numerics` since."""
        # Checkpoints of earlier versions lack these.
        earlier = {"logged_seconds": values["seconds"].get("train", 0.0)}
        found = cls(**{**earlier, **values})
        found.window = tuple(map(tuple, found.window))
        found.meshes = tuple(found.meshes)
        found.numerics_changes = (*found.numerics_changes, *changes)
        return found

    def move_to(self, mesh: str) -> None:
        """The training goes on on `mesh`, "" for one device."""
        if self.meshes[-1:] != (mesh,):
            self.meshes = (*self.meshes, mesh)

    @property
    def mesh(self) -> str:
        """Where the training was, for its card: "" if it never was on more than one device."""
        if self.meshes in ((), ("",)):
            return ""
        return CHANGED_TO.join(mesh or "one device" for mesh in self.meshes)

    def add_seconds(self, kind: str, seconds: float) -> None:
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def evaluate(self, loss: float, accuracy: float, schedule: Schedule) -> None:
        """Notes an evaluation at the current step: the best so far, and whether to stop."""
        self.evaluated_step = self.step
        self.evaluations_since_best += 1
        if self.best_loss is None or loss < self.best_loss:
            self.best_step, self.best_loss, self.best_accuracy = self.step, loss, accuracy
            self.evaluations_since_best = 0
        if schedule.patience and self.evaluations_since_best >= schedule.patience:
            self.stopped = STOPPED_IMPROVING
        elif schedule.target_loss and loss <= schedule.target_loss:
            self.stopped = f"validation loss of {schedule.target_loss:g} reached"
        elif self.step >= schedule.num_steps:
            self.stopped = f"budget of {schedule.num_steps} steps ended"


@dataclasses.dataclass
class TrainingCell:
    """A cell in training. `settings` has its `name` and learning rate.

    `error` says why the cell ended without a result. `rate` is the weight (examples, tokens) per
    second of its last logged steps.
    """

    settings: Cell
    progress: Progress = dataclasses.field(default_factory=Progress)
    error: str = ""
    rate: float | None = None

    @property
    def ended(self) -> bool:
        return bool(self.progress.stopped or self.error)

    def log(self) -> dict[str, float]:
        """Empties the window of steps and sets `rate`; returns loss, accuracy and grad_norm.

        Loss and accuracy are means over examples, the norm over steps.
        """
        progress, window = self.progress, self.progress.window
        weight = sum(row[3] for row in window)
        seconds = progress.seconds.get("train", 0.0)
        elapsed = seconds - progress.logged_seconds
        self.rate = weight / elapsed if elapsed > 0 else None
        weight = max(weight, 1e-9)
        loss = sum(row[1] * row[3] for row in window) / weight
        progress.window, progress.train_loss, progress.logged_seconds = (), loss, seconds
        return {
            "loss": loss,
            "accuracy": sum(row[2] for row in window) / weight,
            "grad_norm": sum(row[4] for row in window) / len(window),
        }
