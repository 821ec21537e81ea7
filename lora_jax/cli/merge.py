"""`lora-jax merge`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lora_jax.cli.requests import Parser, add_json, cell_of, say

EXAMPLES = """\
Example:
  lora-jax merge runs/first/cells/run --out=merged
  python -c "import lora_jax as lj; model = lj.load_model('merged', head='classification')"

The folder holds config.json, model.safetensors and tokenizer.json, with kernels of the base's
shapes and dtypes: at inference nothing is left of the adapter but its effect.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "merge",
        description="Fold a trained adapter into its base and write the model's folder.",
        epilog=EXAMPLES,
    )
    parser.add_argument("cell", help="a run's WORKDIR/cells/NAME")
    parser.add_argument("--out", required=True, help="the folder to write; it must not exist yet")
    add_json(parser)
    options = parser.parse_args(argv)
    cell = cell_of(options.cell)

    from lora_jax.models import save_model
    from lora_jax.train import load_adapter

    adapted = load_adapter(cell / "adapter")
    params = adapted.method.merge(adapted.trainable, adapted.frozen)
    save_model(options.out, adapted.model, params)
    if options.json:
        say(json.dumps({"folder": str(options.out), "merged": len(adapted.trainable)}))
    else:
        say(f"{len(adapted.trainable)} trained parameters merged; the model is in {options.out}")
    return 0
