"""MLflow: a tracking server, or a SQLite file."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from lora_jax.core.errors import RequestError
from lora_jax.trackers.base import library, texts_of, without_passwords

LONGEST_PARAM = 6000  # characters that MLflow takes of a parameter's value
PARAMS_AT_ONCE = 100
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
ID, GROUP = "lora_jax.run_id", "lora_jax.group"


class MLflow:
    """Logs to MLflow; needs the extra `mlflow`.

    A run has its group in the tag `lora_jax.group`, its settings as parameters.

    Args:
      experiment: None for MLFLOW_EXPERIMENT_NAME, or "lora_jax"; made if need be.
      tracking_uri: None for MLFLOW_TRACKING_URI, or `mlflow.db` in the working directory.

    Raises:
      RequestError: the tracking server does not answer, or refuses.
      ModuleNotFoundError: mlflow, or what it needs for databases, is not installed.
    """

    def __init__(self, experiment: str | None = None, tracking_uri: str | None = None):
        mlflow = library("mlflow", "MLflow")
        self._entities = library("mlflow.entities", "MLflow")
        name = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "lora_jax"
        self.title = f"mlflow:{name}"
        uri = tracking_uri or mlflow.get_tracking_uri()
        if uri.partition(":")[0] in DATABASES:  # mlflow-skinny comes without these
            for needed in ("sqlalchemy", "alembic"):
                library(needed, "MLflow")
        try:
            self._client = mlflow.MlflowClient(uri)
            self._experiment = self._find_or_make(name)
        except Exception as error:  # of the database, the server, the network
            line = f"MLflow at {uri} cannot be used: {' '.join(str(error).split())}"
            raise RequestError(
                f"{without_passwords(line)[:400]}; set MLFLOW_TRACKING_URI to a server that runs, "
                "or to sqlite:///FILE.db"
            ) from error

    def _find_or_make(self, experiment: str) -> str:
        found = self._client.get_experiment_by_name(experiment)
        return found.experiment_id if found else self._client.create_experiment(experiment)

    def start(self, name: str, group: str, settings: Mapping[str, Any], run_id: str) -> int | None:
        there = self._client.search_runs([self._experiment], f"tags.`{ID}` = '{run_id}'")
        if there:
            run = there[0]
            self._client.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = {ID: run_id, GROUP: group}
            run = self._client.create_run(self._experiment, tags=tags, run_name=name)
        self._run = run.info.run_id
        self._log_params(settings, run.data.params)
        # Per metric: a store of files is no transaction.
        self._last = {key: self._last_step(key) for key in run.data.metrics}
        return None

    def log(self, step: int, numbers: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._entities.Metric(key, value, now, step)
            for key, value in numbers.items()
            if step > self._last.get(key, -1)
        ]
        if metrics:
            self._client.log_batch(self._run, metrics=metrics)

    def finish(self, summary: Mapping[str, Any]) -> None:
        for key, text in texts_of(summary).items():
            self._client.set_tag(self._run, key, text)
        status = "FAILED" if "error" in summary else "FINISHED" if summary else "KILLED"
        self._client.set_terminated(self._run, status)

    def _log_params(self, settings: Mapping[str, Any], there: Mapping[str, str]) -> None:
        """Parameters cannot be changed: of a run that is gone on with, the first ones stay."""
        params = [
            self._entities.Param(key, str(value)[:LONGEST_PARAM])
            for key, value in settings.items()
            if key not in there
        ]
        for first in range(0, len(params), PARAMS_AT_ONCE):
            self._client.log_batch(self._run, params=params[first : first + PARAMS_AT_ONCE])

    def _last_step(self, key: str) -> int:
        return max(one.step for one in self._client.get_metric_history(self._run, key))
