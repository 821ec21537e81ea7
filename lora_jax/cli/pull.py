"""`lora-jax pull`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lora_jax.cli.parser import Parser, add_hub, say

EXAMPLES = """\
Examples:
  lora-jax pull me/reviews --out=reviews
  lora-jax predict reviews/cells/run --texts "a lovely film"
  lora-jax verify  reviews/cells/run          trains it again here and compares
  lora-jax merge   reviews --out=merged       the model with the adapter folded in

  A branch, a tag or a commit of it:
    lora-jax pull me/reviews --revision=r8 --out=reviews-r8

Any repository in PEFT's format can be pulled; one that `lora-jax push` wrote brings the run's
record along. Other files (pickles, optimizer states) stay where they are, and nothing is executed.
The folder appears whole or not at all. For private repositories, log in with `hf auth login` or
set HF_TOKEN.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("pull", epilog=EXAMPLES)
    parser.add_argument("repo", metavar="OWNER/NAME", help="a repository of the hub")
    parser.add_argument("--out", required=True, help="the folder to write; it must not exist yet")
    add_hub(parser, "branch, tag or commit (default: main)")
    options = parser.parse_args(argv)

    from lora_jax.hub import pull

    pulled = pull(options.repo, options.out, revision=options.revision)
    if options.json:
        found = {"folder": str(pulled.folder), "commit": pulled.commit, "runs": list(pulled.runs)}
        say(json.dumps({**found, "files": dict(pulled.files)}))
        return 0
    total = sum(pulled.files.values())
    say(f"{len(pulled.files)} files ({total:,} bytes) are in {pulled.folder}; {pulled.commit[:12]}")
    for name in pulled.runs:
        say(f"the run: {pulled.folder / 'cells' / name}")
    return 0
