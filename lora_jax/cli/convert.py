"""`lora-jax convert`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import lora_jax as lj
from lora_jax.cli.parser import Parser, add_peft_base, say

EXAMPLES = """\
Examples:
  A run's adapter for peft, vLLM and others:
    lora-jax convert runs/first/cells/run --out=adapter
    python -c "from peft import PeftModel; model = PeftModel.from_pretrained(base, 'adapter')"
  For servers that read r and lora_alpha alone (patterns, rsLoRA and PiSSA baked in; alpha = r):
    lora-jax convert adapter --model=path/to/base --plain --out=plain

What PEFT cannot say (an adapter of a tied table, single rows, methods that add no a @ b) is an
error that says what to do; `lora-jax merge` folds anything into its base.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("convert", epilog=EXAMPLES)
    parser.add_argument("adapter", help="a run's WORKDIR/cells/NAME, or a folder in PEFT's format")
    parser.add_argument("--out", required=True, help="the folder to write; it must not exist yet")
    add_peft_base(parser)
    parser.add_argument("--plain", action="store_true", help="alpha = r, one rank, scales in B")
    parser.add_argument("--dtype", help="of the factors, as float16 (default float32)")
    options = parser.parse_args(argv)

    from lora_jax.io.atomic import check_new
    from lora_jax.models.load import checked_dtype
    from lora_jax.serve.adapters import is_peft

    check_new(options.out)
    dtype = None if options.dtype is None else checked_dtype(options.dtype)
    adapted = lj.load_adapter(options.adapter, options.model, untie=options.untie)
    model, trainable = adapted.model, adapted.trainable
    if is_peft(options.adapter):
        _check_names(options.adapter, model)
    lj.save_adapter(options.out, adapted.method, trainable, model, plain=options.plain, dtype=dtype)
    labels = {} if model.head is None else (model.labels or {}).get("id2label") or {}
    names = list(labels.values())
    lines = [f"{len(trainable)} adapted or trained parameters; the adapter is in {options.out}"]
    if names:
        lines.append(
            f"classes {', '.join(map(str, names))}: in the file's metadata (lora_jax.labels)"
        )
    found = {"folder": str(options.out), "entries": len(trainable), "labels": names}
    say(json.dumps(found) if options.json else "\n".join(lines))
    return 0


def _check_names(adapter: str, model: lj.Model) -> None:
    """Raises `RequestError` if the adapter's class has a head that `model` leaves out.

    What is written is named for `model`'s own class, where peft on the other would find nothing.
    """
    from lora_jax.peft.keys import read_keys
    from lora_jax.peft.names import Names

    keys = read_keys(Path(adapter))
    if cut := Names.of(model).view_of(keys.parts).cut:
        raise lj.RequestError(
            f"{adapter} was made on a class with a head that {model.name} is read without (its "
            f"modules begin with {cut!r}) and could not be read there again; `lora-jax merge` it"
        )
