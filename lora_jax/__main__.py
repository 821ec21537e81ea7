"""`python -m lora_jax`, the same as `lora-jax`."""

import sys

from lora_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
