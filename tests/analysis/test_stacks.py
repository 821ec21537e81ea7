"""Measures of stacked kernels end, and equal those of each kernel alone."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np

from lora_jax.core.stacks import one_by_one

# On two threads, jaxlib 0.10.2's QR of stacks waits for the threads that it holds.
PROGRAM = """
import jax, numpy as np, lora_jax as lj
draw = np.random.default_rng(0)
kernels = draw.standard_normal((12, 192, 192)).astype(np.float32)
a, b = (draw.standard_normal(shape).astype(np.float32) for shape in ((12, 192, 8), (12, 8, 192)))
for _ in range(20):
    jax.block_until_ready(lj.analysis.amplification(a @ b, kernels, rank=8))
    jax.block_until_ready(lj.analysis.delta_svd(a, b))
"""


def test_measures_of_stacked_kernels_end_on_two_threads():
    environment = {**os.environ, "NPROC": "2", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    subprocess.run([sys.executable, "-c", PROGRAM], env=environment, timeout=120, check=True)


def test_one_by_one_is_the_factorization_of_each_matrix():
    matrices = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32)
    q, r = one_by_one(jnp.linalg.qr, jnp.asarray(matrices))
    np.testing.assert_allclose(q @ r, matrices, atol=1e-5)
    for place in np.ndindex(2, 3):
        expected, _ = np.linalg.qr(matrices[place].astype(np.float64))
        np.testing.assert_allclose(np.abs(q[place]), np.abs(expected), atol=1e-5)
