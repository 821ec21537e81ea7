"""`lora-jax merge`."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

import lora_jax as lj
from lora_jax.cli.parser import Parser, add_peft_base, say

DTYPES = ("bfloat16", "float16", "float32")
EXAMPLES = """\
Examples:
  lora-jax merge runs/first/cells/run --out=merged
  python -c "import lora_jax as lj; model = lj.load_model('merged', head='classification')"
  An adapter that peft wrote, into a base of your choice:
    lora-jax merge path/to/adapter --model=path/to/base --out=merged

  One trained on a base in four bits: into 16 bits, or into four again with what that costs:
    lora-jax merge runs/qlora/cells/run --out=merged --dtype=bfloat16
    lora-jax merge runs/qlora/cells/run --out=merged4 --requantize

The folder holds config.json, model.safetensors and tokenizer.json, with kernels of the base's
shapes and dtypes, and transformers opens it: at inference nothing is left of the adapter but its
effect. --dtype is of all weights but a task's head. Each sum W + ΔW is made in float32 and rounded
once; where it is rounded to 16 bits, a line says how much of ΔW that loses.
Merging needs no tokens: a run whose completions were encoded by an earlier version merges, too.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("merge", epilog=EXAMPLES)
    parser.add_argument("cell", help="a run's WORKDIR/cells/NAME, or a folder in PEFT's format")
    parser.add_argument("--out", required=True, help="the folder to write; it must not exist yet")
    add_peft_base(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of all weights, a task's head apart (a base in four bits needs one)",
    )
    how.add_argument(
        "--requantize", action="store_true", help="quantise what was: says what is lost"
    )
    options = parser.parse_args(argv)

    from lora_jax.io.atomic import check_new

    check_new(options.out)
    adapted = lj.load_adapter(options.cell, options.model, untie=options.untie)
    fold = _in_four_bits if options.requantize else _merged
    params, numbers, lines = fold(options, adapted)
    lj.save_model(options.out, adapted.model, params)
    count = len(adapted.trainable)
    found = {"folder": str(options.out), "merged": count, **numbers}
    first = f"{count} trained parameters merged; the model is in {options.out}"
    say(json.dumps(found) if options.json else "\n".join([first, *lines]))
    return 0


# What follows a merge: the params, what `--json` adds, and the lines that say it.
Merged = tuple[Any, dict[str, Any], list[str]]


def _in_four_bits(options, adapted: lj.Adapted) -> Merged:
    import numpy as np

    model = adapted.model
    # Any tokens will do: it is the same function that is compared.
    ids = np.arange(3, 35, dtype=np.int32)[None] % model.config.vocab_size
    found = lj.merge_and_requantize(
        adapted.method, adapted.trainable, adapted.frozen, apply=model.apply,
        inputs=(ids, np.ones_like(ids)),
    )  # fmt: skip
    changed = [path for path, change in found.changes.items() if change]
    numbers = {"drift": found.drift, "mean_drift": found.mean_drift, "errors": found.errors}
    if not changed:
        return found.params, numbers, []
    worst = max(changed, key=found.errors.__getitem__)
    lines = [
        f"{len(changed)} kernels in four bits again: relative error up to "
        f"{found.errors[worst]:.3f} ({worst}, where the adapter's share is "
        f"{found.changes[worst]:.3f})",
        f"outputs for 32 tokens moved by {found.mean_drift:.2g} on average, "
        f"{found.drift:.2g} at most",
    ]
    return found.params, numbers, lines


def _merged(options, adapted: lj.Adapted) -> Merged:
    from lora_jax.core.trees import Stored, flatten
    from lora_jax.methods.merging import rounding_of, say_rounding

    method, trainable, frozen = adapted.method, adapted.trainable, adapted.frozen
    numbers: dict[str, Any] = {}
    lines = []
    in_four_bits = any(isinstance(x, Stored) for x in flatten(frozen).leaves)
    if options.dtype is None and in_four_bits:
        raise lj.RequestError(
            f"the base of {options.cell} is in four bits; say what the merged kernels shall "
            f"be: --dtype ({', '.join(DTYPES)}), or --requantize"
        )
    params = method.merge(trainable, frozen, dtype=options.dtype)
    if options.dtype:
        params = _in_dtype(params, options.dtype, adapted.model.head_pattern)
    if in_four_bits:
        from lora_jax.quant import merge_error

        errors = merge_error(method, trainable, frozen, dtype=options.dtype, params=params)
        numbers["errors"] = errors
        lines.append(
            f"{len(errors)} quantised kernels merged into {options.dtype}: rounding moved them "
            f"by {max(errors.values(), default=0.0):.2g} of their norm at most"
        )
    if rounded := rounding_of(method.bind(trainable, frozen), params):
        numbers["rounding"] = {path: dataclasses.asdict(x) for path, x in rounded.items()}
        lines.append(say_rounding(rounded))
    return params, numbers, lines


def _in_dtype(params: Any, dtype: str, head: str) -> Any:
    """All weights in one dtype; a task's head stays as it was trained."""
    from lora_jax.core.trees import flatten, is_float
    from lora_jax.methods.merging import check_finite

    flat = flatten(params)
    leaves = []
    for path, leaf in flat.items():
        if is_float(leaf) and not re.fullmatch(head, path):
            leaf = leaf.astype(dtype)
            check_finite(path, leaf)
        leaves.append(leaf)
    return flat.unflatten(leaves)
