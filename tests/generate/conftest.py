"""Fast tests compile fast: what is tested is the program, not how well XLA optimises it."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Most optimisations off, except in slow tests, which compile as users do."""
    before = jax.config.values["jax_disable_most_optimizations"]
    if request.node.get_closest_marker("slow") is None:
        jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
