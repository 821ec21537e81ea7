"""Fast tests compile fast: what is tested is the program, not how well XLA optimises it."""

from __future__ import annotations

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation(request):
    """Most optimisations off, except in slow tests, which compile as users do."""
    is_slow = request.node.get_closest_marker("slow") is not None
    jax.config.update("jax_disable_most_optimizations", not is_slow)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
