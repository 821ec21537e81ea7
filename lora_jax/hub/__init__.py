"""Finished runs on the Hugging Face Hub: pushed with a model card, pulled with their record."""

from __future__ import annotations

from lora_jax.hub.download import Pulled as Pulled
from lora_jax.hub.download import pull as pull
from lora_jax.hub.upload import Pushed as Pushed
from lora_jax.hub.upload import push as push

__all__ = ["Pulled", "Pushed", "pull", "push"]
