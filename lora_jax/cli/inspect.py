"""`lora-jax inspect`."""

from __future__ import annotations

import json
from collections.abc import Sequence

import lora_jax as lj
from lora_jax.cli.parser import OVERRIDES, Parser, say

EXAMPLES = f"""\
{OVERRIDES}

Examples:
  What a config would adapt:
    lora-jax inspect --config=reviews_minilm:lora --config.method.targets=all-linear
  By a regular expression over paths (it must match the whole path):
    lora-jax inspect --config=reviews_minilm:lora \\
        --config.method.targets='encoder/layers/[45]/.*/kernel'
  From shapes alone, without the weights (GPT-2 and GPT-3 of all sizes, RoBERTa):
    lora-jax inspect --shapes=gpt3-175b --targets=q,v --rank=4
  What a run trained:
    lora-jax inspect runs/first/cells/run

Targets may be aliases joined by commas: q k v o up down embed head all-linear.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("inspect", epilog=EXAMPLES)
    parser.add_argument("cell", nargs="?", help="a run's WORKDIR/cells/NAME")
    parser.add_argument("--config", metavar="FILE.py[:arg]", help="the experiment, instead")
    parser.add_argument(
        "--shapes", metavar="NAME", help="a model by its shapes, such as gpt2-medium"
    )
    parser.add_argument("--targets", default="q,v", help="with --shapes (default: q,v)")
    parser.add_argument("--rank", type=int, default=8, help="with --shapes (default: 8)")
    options, config = parser.parse_with_config(argv)

    if options.shapes is not None:
        from lora_jax.models.shapes import abstract_model

        model = abstract_model(options.shapes)
        method = lj.LoRA(targets=options.targets, rank=options.rank, aliases=model.aliases)
    elif options.cell is not None:
        from lora_jax.io.paths import cell_of

        adapted = lj.load_adapter(cell_of(options.cell))
        model, method = adapted.model, adapted.method
    else:
        import jax

        from lora_jax.cli.requests import needs_config
        from lora_jax.train import make_method, make_model

        config = needs_config(config, "inspect", sections=("model", "method"))
        model = make_model(config.model, jax.random.key(0))
        method = make_method(config.method, model)
    table = method.table(model.params)
    rows = [
        {
            "path": row.path,
            "shape": list(row.shape),
            "rank": row.rank,
            "scale": row.scale,
            "trainable": row.num_trainable,
        }
        for row in table
    ]
    found = {"rows": rows, "trainable": table.num_trainable, "params": table.num_params}
    say(json.dumps(found) if options.json else str(table))
    return 0
