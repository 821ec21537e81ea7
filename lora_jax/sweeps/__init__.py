"""Sweeps: many cells of one experiment."""

from lora_jax.sweeps.cells import Cell as Cell
from lora_jax.sweeps.cells import read_sweep as read_sweep
from lora_jax.sweeps.run import run_sweep as run_sweep
