"""The trainer's tiny task, for sweeps on disk."""

from tests.train.conftest import make_config, reviews_file

__all__ = ["make_config", "reviews_file"]
