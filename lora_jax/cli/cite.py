"""`lora-jax cite`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lora_jax.cli.parser import Parser, say

EXAMPLES = """\
Examples:
  lora-jax cite runs/demo/cells/lora-qv-r8     one run, by the hash of its config
  lora-jax cite runs/demo                      all its finished runs together

The hash does not depend on the order of the settings, nor on workdir, mesh, or how often a run
logs. `lora-jax verify` trains a run again and compares.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("cite", epilog=EXAMPLES)
    parser.add_argument("run", help="a run's WORKDIR/cells/NAME, or a workdir")
    options = parser.parse_args(argv)

    from lora_jax.io.untrusted import printable
    from lora_jax.report.cite import cite

    text = printable(cite(options.run))
    say(json.dumps({"bibtex": text}) if options.json else text.rstrip())
    return 0
