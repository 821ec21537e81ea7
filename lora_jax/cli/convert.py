"""`lora-jax convert`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.cli.requests import Parser, add_json, say
from lora_jax.core.errors import RequestError
from lora_jax.io.atomic import check_new

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
    parser = Parser(
        "convert",
        description="Write an adapter in PEFT's format (adapter_config.json and safetensors).",
        epilog=EXAMPLES,
    )
    parser.add_argument("adapter", help="a run's WORKDIR/cells/NAME, or a folder in PEFT's format")
    parser.add_argument("--out", required=True, help="the folder to write; it must not exist yet")
    parser.add_argument(
        "--model", help="the base of a PEFT adapter, where its config names no good"
    )
    parser.add_argument("--plain", action="store_true", help="alpha = r, one rank, scales in B")
    parser.add_argument("--dtype", help="of the factors, as float16 (default float32)")
    parser.add_argument(
        "--untie", action="store_true", help="give a tied base's head a kernel of its own"
    )
    add_json(parser)
    options = parser.parse_args(argv)
    check_new(options.out)

    from lora_jax.models.load import checked_dtype
    from lora_jax.serve.adapters import is_peft, load_adapter

    dtype = None if options.dtype is None else checked_dtype(options.dtype)
    adapted = load_adapter(options.adapter, options.model, untie=options.untie)
    model, method, trainable = adapted.model, adapted.method, adapted.trainable

    if is_peft(options.adapter):
        _check_names(options.adapter, model)

    from lora_jax.peft.load import save_adapter

    save_adapter(options.out, method, trainable, model, plain=options.plain, dtype=dtype)
    names = (
        [] if model.head is None else list(((model.labels or {}).get("id2label") or {}).values())
    )
    if options.json:
        numbers = {"folder": str(options.out), "entries": len(trainable), "labels": names}
        say(json.dumps(numbers))
    else:
        say(f"{len(trainable)} adapted or trained parameters; the adapter is in {options.out}")
        if names:
            say(f"classes {', '.join(map(str, names))}: in the file's metadata (lora_jax.labels)")
    return 0


def _check_names(adapter: str, model: Any) -> None:
    """Raises `RequestError` if the adapter's class has a head that `model` leaves out.

    What is written is named for `model`'s own class, where peft on the other would find nothing.
    """
    from lora_jax.peft.keys import read_keys
    from lora_jax.peft.names import Names

    keys = read_keys(Path(adapter))
    if cut := Names.of(model).view_of(keys.parts).cut:
        raise RequestError(
            f"{adapter} was made on a class with a head that {model.name} is read without (its "
            f"modules begin with {cut!r}) and could not be read there again; `lora-jax merge` it"
        )
