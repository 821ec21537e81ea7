"""Fast tests compile fast, as those of `generate` do."""

from tests.generate.conftest import quick_compilation

__all__ = ["quick_compilation"]
