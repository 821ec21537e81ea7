"""`lora-jax inspect`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lora_jax.cli.requests import OVERRIDES, Parser, add_json, cell_of, needs_config, say

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
    parser = Parser(
        "inspect",
        description="What a method adapts: path, shape, rank, scale, trainable parameters.",
        epilog=EXAMPLES,
    )
    parser.add_argument("cell", nargs="?", help="a run's WORKDIR/cells/NAME")
    parser.add_argument("--config", metavar="FILE.py[:arg]", help="the experiment, instead")
    parser.add_argument(
        "--shapes", metavar="NAME", help="a model by its shapes, such as gpt2-medium"
    )
    parser.add_argument("--targets", default="q,v", help="with --shapes (default: q,v)")
    parser.add_argument("--rank", type=int, default=8, help="with --shapes (default: 8)")
    add_json(parser)
    options, config = parser.parse_with_config(argv)

    import jax

    from lora_jax.serve.adapters import load_adapter
    from lora_jax.train import make_method, make_model

    if options.shapes is not None:
        from lora_jax.methods import LoRA
        from lora_jax.models.shapes import abstract_model

        model = abstract_model(options.shapes)
        method = LoRA(targets=options.targets, rank=options.rank, aliases=model.aliases)
    elif options.cell is not None:
        adapted = load_adapter(cell_of(options.cell))
        model, method = adapted.model, adapted.method
    else:
        config = needs_config(config, "inspect", sections=("model", "method"))
        model = make_model(config.model, jax.random.key(0))
        method = make_method(config.method, model)
    table = method.table(model.params)
    if options.json:
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
        result = {"rows": rows, "trainable": table.num_trainable, "params": table.num_params}
        say(json.dumps(result))
    else:
        say(str(table))
    return 0
