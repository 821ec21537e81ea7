"""`lora-jax predict`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path

import lora_jax as lj
from lora_jax.cli.parser import Parser, add_decoding, decoding_given, say, tell

EXAMPLES = """\
Examples:
  The classes of new texts, with the probability of each class:
    lora-jax predict runs/first/cells/run --data=new.csv --out=labels.csv
  The texts are in another column than the run's were; any of jsonl, csv, tsv, parquet in and out:
    lora-jax predict runs/first/cells/run --data=new.jsonl --text=body --out=labels.parquet
  A run trained on pairs of texts:
    lora-jax predict runs/rte/cells/run --data=pairs.tsv --text=sentence1,sentence2 --out=labels.csv
  A few texts, without files:
    lora-jax predict runs/first/cells/run --texts "a lovely film" "a waste of time"
  Completions of a run on a language model, one for each prompt:
    lora-jax predict runs/e2e/cells/run --data=prompts.jsonl --out=completions.jsonl \\
        --max-new-tokens=64 --num-beams=10

The output holds the columns of the input, then `prediction` (a class name, a number or a
completion) and, of classes, `probability_NAME` for each. It appears whole or not at all. In Python:
  import lora_jax as lj
  found = lj.predict("runs/first/cells/run", ["a lovely film"])   # found[0], found.probabilities
"""
SECONDS = 2.0  # between lines of progress


def run(argv: Sequence[str]) -> int:
    parser = Parser("predict", epilog=EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="a run's WORKDIR/cells/NAME")
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--data", metavar="FILE", help="the texts: jsonl, csv, tsv or parquet")
    given.add_argument("--texts", nargs="+", metavar="TEXT", help="the texts themselves")
    parser.add_argument("--out", metavar="FILE", help="where to write (default: standard output)")
    parser.add_argument("--force", action="store_true", help="replace what is at --out")
    parser.add_argument(
        "--text", metavar="COLUMN", help="column of the texts, or A,B of pairs (default: the run's)"
    )
    parser.add_argument("--merged", action="store_true", help="merge first, then the plain model")
    add_decoding(parser.add_argument_group("of completions"), "max_new_tokens", "num_beams")
    options = parser.parse_args(argv)
    if options.text is not None and options.data is None:
        raise lj.RequestError("--text names a column of --data, and there is none")

    from lora_jax.data.tables import kind_of, write_rows

    out = None if options.out is None else Path(options.out)
    if out is not None:
        kind_of(out)
        if out.exists() and not options.force:
            raise lj.RequestError(f"{out} exists already; choose another file, or add --force")

    decoding = decoding_given(options)
    found = lj.predict(
        options.run,
        options.texts or options.data,
        text_column=options.text and options.text.split(","),
        merged=options.merged,
        settings=lj.Decoding(**{"max_new_tokens": 64, **decoding}) if decoding else None,
        on_progress=_Progress(),
    )
    rows = list(found.rows())
    if out is not None:
        write_rows(out, rows)
    if options.json:
        numbers = {"n": len(rows), "classes": list(found.class_names)}
        numbers |= {"rows": rows} if out is None else {"out": str(out)}
        say(json.dumps(numbers))
    elif out is None:
        for row in rows:
            say(json.dumps(row, ensure_ascii=False))
    else:
        say(f"{len(rows)} predictions are in {out}{_counts(found)}")
    return 0


def _counts(found) -> str:
    counts = [f"{name} {found.values.count(name)}" for name in found.class_names[:8]]
    return f": {', '.join(counts)}" if counts else ""


class _Progress:
    """A line on standard error every other second; none where all is done before."""

    def __init__(self):
        self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        if done < total and time.monotonic() - self._last >= SECONDS:
            self._last = time.monotonic()
            tell(f"{done:,} of {total:,}")
