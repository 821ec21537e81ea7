"""Sweeps: many cells of one experiment."""

from lora_jax.sweep.cells import Cell as Cell
from lora_jax.sweep.cells import read_sweep as read_sweep
from lora_jax.sweep.run import run_sweep as run_sweep
