"""Variants outside the package, registered for the time of a test."""

import pytest

import lora_jax as lj
from lora_jax.methods.registry import METHODS


@pytest.fixture
def register(monkeypatch):
    """`register(name, Class)` as `lj.register_method`, forgotten after the test."""

    def register(name, kind):
        monkeypatch.setattr(METHODS, "_kinds", dict(METHODS._kinds))
        lj.register_method(name, kind)

    return register
