"""`lora-jax evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lora_jax.cli.requests import Parser, add_json, cell_of, say

EXAMPLES = """\
Examples:
  lora-jax evaluate runs/first/cells/run
  lora-jax evaluate runs/first/cells/run --split=validation --json
  lora-jax evaluate runs/first/cells/run --merged     the adapter folded into the base: the same

The data and the model are those of the run's config; its data must still have the same hash.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("evaluate", description="Loss and accuracy of a trained cell.", epilog=EXAMPLES)
    parser.add_argument("cell", help="a run's WORKDIR/cells/NAME")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--merged", action="store_true", help="merge first, then the plain model")
    add_json(parser)
    options = parser.parse_args(argv)
    cell = cell_of(options.cell)

    from lora_jax.train.again import evaluate_cell

    result, data_hash = evaluate_cell(cell, split=options.split, merged=options.merged)
    numbers = {
        "split": options.split,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "n": result.num_examples,
        "data_hash": data_hash,
    }
    if options.json:
        say(json.dumps(numbers))
    else:
        say(
            f"{cell.name}: {options.split} loss {result.loss:.4f}, accuracy {result.accuracy:.4f} "
            f"({result.num_examples:,} examples)"
        )
    return 0
