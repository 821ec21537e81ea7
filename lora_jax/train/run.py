"""A training under way: steps, logs, evaluations and checkpoints as they fall due."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lora_jax.core.errors import RequestError
from lora_jax.train.bookkeeping import Bookkeeping
from lora_jax.train.build import Setup
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.evaluate import Evaluation, evaluate
from lora_jax.train.metrics import MetricsWriter
from lora_jax.train.numerics import numerics
from lora_jax.train.progress import Show
from lora_jax.train.state import TrainState


class StopRequested(Exception):
    """A signal asked to stop, and all that must not be lost is being saved."""


class Diverged(RequestError):
    """A loss, gradient or weight is not a number: running the cell again would end there too."""


class Run:
    """A training under way: what changes from step to step."""

    def __init__(
        self,
        setup: Setup,
        books: Bookkeeping,
        state: TrainState,
        best: Any,
        checkpoints: Checkpoints,
        metrics: MetricsWriter,
        show: Show,
        stop_requested: Callable[[], str],
    ):
        self.setup = setup
        self.books = books
        self.state = state
        self.best = best
        self.seconds = dict(books.seconds)
        self._checkpoints = checkpoints
        self._metrics = metrics
        self._show = show
        self._stop_requested = stop_requested
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._rate: float | None = None
        self._rate_from = (self.seconds.get("train", 0.0), 0.0)
        self._weight = 0.0
        self._saved_step = checkpoints.latest_step
        self._mark, self._mark_compile = time.perf_counter(), self._compile_seconds()

    def until_stopped(self) -> None:
        """Steps, logs, evaluates and saves as they fall due. Raises `StopRequested`."""
        # What is due is decided from the books alone: a resumed run does just what was left.
        while not self.books.stopped:
            if self._evaluation_due():
                self._evaluate()
            if self._save_due():
                self._save()
            if self.books.stopped:
                return
            if self._stop_requested():
                self._save()
                raise StopRequested
            self._step()
            if self.books.step % self.setup.log_every == 0:
                self._log()
            self._show(self.books.step, self.books.train_loss, self._rate)

    def test(self) -> Evaluation:
        """Scores the test split with the best trainable and logs it."""
        test = self._scored(self.best, self.setup.test)
        self._lap("evaluate")
        self._metrics.write(
            step=self.books.best_step, split="test", loss=test.loss, accuracy=test.accuracy
        )
        self._note(seconds=dict(self.seconds))
        return test

    def _step(self) -> None:
        batch = next(self.setup.batches)
        self.state, metrics = self.setup.step(self.state, self.setup.frozen, batch)
        self._note(step=self.books.step + 1)
        self._pending.append((self.books.step, metrics))

    def _evaluation_due(self) -> bool:
        step = self.books.step
        due = step > 0 and (step % self.setup.eval_every == 0 or step >= self.setup.num_steps)
        return due and self.books.evaluated_step < step

    def _save_due(self) -> bool:
        step = self.books.step
        due = step > 0 and (step % self.setup.checkpoint_every == 0 or bool(self.books.stopped))
        return due and self._saved_step != step

    def _evaluate(self) -> None:
        self._fetch()
        self._lap("train")
        try:
            result = self._scored(self.state.trainable, self.setup.validation)
        except StopRequested:
            # The evaluation is not in the books, so it is the first thing done on resuming.
            self._save()
            raise
        if not math.isfinite(result.loss):
            raise self._not_finite("validation loss", result.loss, self.books.step)
        before = self.books.best_step
        self.books = self.books.after_evaluation(
            result.loss,
            result.accuracy,
            patience=self.setup.patience,
            num_steps=self.setup.num_steps,
        )
        if self.books.best_step != before:
            self.best = copy_arrays(self.state.trainable)
        self._lap("evaluate")
        if self.books.stopped and self.books.window:
            self._log()
        self._metrics.write(
            step=self.books.step,
            split="validation",
            loss=result.loss,
            accuracy=result.accuracy,
            seconds=sum(self.seconds.values()),
        )

    def _scored(self, trainable: Any, batches: Any) -> Evaluation:
        setup = self.setup
        return evaluate(setup.scores, trainable, setup.frozen, self._until_signal(batches))

    def _until_signal(self, batches: Any) -> Iterator[Any]:
        for batch in batches:
            if self._stop_requested():
                raise StopRequested
            yield batch

    def _fetch(self) -> None:
        """Brings the pending steps' metrics to the host, which waits for the device."""
        names = ("loss", "correct", "weight", "grad_norm")
        fetched = jax.device_get(
            [[metrics[name] for name in names] for _, metrics in self._pending]
        )
        rows = tuple(
            (step, *map(float, values))
            for (step, _), values in zip(self._pending, fetched, strict=True)
        )
        self._pending = []
        for step, loss, _, _, grad_norm in rows:
            for what, value in (("loss", loss), ("gradient norm", grad_norm)):
                if not math.isfinite(value):
                    raise self._not_finite(what, value, step)
        self._weight += sum(row[3] for row in rows)
        self._note(window=self.books.window + rows)

    def _log(self) -> None:
        self._fetch()
        self._lap("train")
        self.books, values = self.books.after_logging()
        seconds, weight = self.seconds["train"], self._weight
        elapsed = seconds - self._rate_from[0]
        self._rate = (weight - self._rate_from[1]) / elapsed if elapsed > 0 else None
        self._rate_from = (seconds, weight)
        self._metrics.write(
            step=self.books.step,
            split="train",
            **values,
            lr=float(self.setup.schedule(self.books.step - 1)),
            **{f"{self.setup.task.unit}_per_s": self._rate},
            seconds=sum(self.seconds.values()),
        )
        self._lap("log")

    def _save(self) -> None:
        if self._saved_step == self.books.step:
            return
        self._fetch()
        self._lap("train")
        if not _all_finite(self.state.trainable):
            raise self._not_finite("a weight", math.nan, self.books.step)
        self._metrics.sync()
        self._note(metrics_lines=self._metrics.num_lines, seconds=dict(self.seconds))
        groups = {"state": self.state}
        if self.books.best_step not in (0, self.books.step):
            groups["best"] = self.best
        facts = {
            "bookkeeping": self.books.to_json(),
            "data": self.setup.batches.get_state(),
            "numerics": numerics(),
        }
        self._checkpoints.save(self.books.step, groups, facts)
        self._saved_step = self.books.step
        self._lap("save")

    def _note(self, **changes: Any) -> None:
        self.books = dataclasses.replace(self.books, **changes)

    def _lap(self, kind: str) -> None:
        """Books the time since the last lap under `kind`, less what went into compiling."""
        now, compiled = time.perf_counter(), self._compile_seconds()
        compiling = compiled - self._mark_compile
        for name, value in ((kind, now - self._mark - compiling), ("compile", compiling)):
            self.seconds[name] = self.seconds.get(name, 0.0) + value
        self._mark, self._mark_compile = now, compiled

    def _compile_seconds(self) -> float:
        return self.setup.step.seconds + self.setup.scores.seconds

    def _not_finite(self, what: str, value: float, step: int) -> Diverged:
        with contextlib.suppress(RequestError):
            self._checkpoints.wait()
        good = self._checkpoints.latest_step
        kept = (
            "no checkpoint was written yet"
            if good is None
            else f"the checkpoint of step {good} is kept"
        )
        lr = float(self.setup.schedule(max(0, step - 1)))
        return Diverged(
            f"{what} is {value} at step {step} (learning rate {lr:g}); {kept}. Lower optimizer.lr "
            "or optimizer.clip_norm and train in another workdir"
        )


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def copy_arrays(tree: Any) -> Any:
    """Arrays of their own: the next step takes the state's buffers back."""
    return jax.tree.map(jnp.copy, tree)
