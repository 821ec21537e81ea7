"""Trackers of experiments: where a cell's metrics go besides `metrics.jsonl`.

`lj.train`, `lj.sweep` and `run_sweep` take them as `trackers=[…]`, the command line as `--track=…`.
One of your own is a class of three functions: see `Tracker`.
"""

from lora_jax.trackers.base import Tracker as Tracker
from lora_jax.trackers.mlflow_runs import MLflow as MLflow
from lora_jax.trackers.names import NAMES as NAMES
from lora_jax.trackers.names import make_tracker as make_tracker
from lora_jax.trackers.tensorboard import TensorBoard as TensorBoard
from lora_jax.trackers.trackio_runs import Trackio as Trackio
from lora_jax.trackers.wandb_runs import WandB as WandB
