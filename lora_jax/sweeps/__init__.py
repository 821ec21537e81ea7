"""Sweeps: many cells of one experiment."""

from lora_jax.sweeps.cells import Cell as Cell
from lora_jax.sweeps.cells import Sweep as Sweep
from lora_jax.sweeps.cells import Tuning as Tuning
from lora_jax.sweeps.cells import read_sweep as read_sweep
from lora_jax.sweeps.run import plan_sweep as plan_sweep
from lora_jax.sweeps.run import run_sweep as run_sweep
