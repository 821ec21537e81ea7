"""The old name of `lora_jax.peft` and `lora_jax.io`, which goes in the next release."""

from lora_jax._public import renamed

__getattr__ = renamed(
    __name__,
    peft=("lora_jax.peft", "lora_jax.peft"),
    Factors=("lora_jax.peft.Factors", "lora_jax.peft.Factors"),
    read_factors=("lora_jax.peft.read_factors", "lora_jax.peft.read_factors"),
    atomic_path=("lora_jax.io.atomic_path", "lora_jax.io.atomic_path"),
    write_json=("lora_jax.io.write_json", "lora_jax.io.write_json"),
    write_text=("lora_jax.io.write_text", "lora_jax.io.write_text"),
)
