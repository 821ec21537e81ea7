"""`lora-jax merge`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lora_jax.cli.adapters import load_adapted
from lora_jax.cli.requests import Parser, add_json, say
from lora_jax.formats.atomic import check_new

EXAMPLES = """\
Examples:
  lora-jax merge runs/first/cells/run --out=merged
  python -c "import lora_jax as lj; model = lj.load_model('merged', head='classification')"
  An adapter that peft wrote, into a base of your choice:
    lora-jax merge path/to/adapter --model=path/to/base --out=merged

The folder holds config.json, model.safetensors and tokenizer.json, with kernels of the base's
shapes and dtypes, and transformers opens it: at inference nothing is left of the adapter but its
effect.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser(
        "merge",
        description="Fold a trained adapter into its base and write the model's folder.",
        epilog=EXAMPLES,
    )
    parser.add_argument("cell", help="a run's WORKDIR/cells/NAME, or a folder in PEFT's format")
    parser.add_argument("--out", required=True, help="the folder to write; it must not exist yet")
    parser.add_argument(
        "--model", help="the base of a PEFT adapter, where its config names no good"
    )
    parser.add_argument(
        "--untie", action="store_true", help="give a tied base's head a kernel of its own"
    )
    add_json(parser)
    options = parser.parse_args(argv)
    check_new(options.out)

    model, method, trainable, frozen = load_adapted(
        options.cell, options.model, untie=options.untie
    )

    from lora_jax.models import save_model

    save_model(options.out, model, method.merge(trainable, frozen))
    if options.json:
        say(json.dumps({"folder": str(options.out), "merged": len(trainable)}))
    else:
        say(f"{len(trainable)} trained parameters merged; the model is in {options.out}")
    return 0
