"""The trainer's tiny task, for tracked sweeps."""

from tests.train.conftest import make_config, reviews_file

__all__ = ["make_config", "reviews_file"]
