"""`lora-jax push`."""

from __future__ import annotations

import json
from collections.abc import Sequence

from lora_jax.cli.parser import Parser, add_hub, say, tell

EXAMPLES = """\
Examples:
  See the files, their sizes and the card first; nothing is sent:
    lora-jax push runs/first/cells/run --repo=me/reviews --license=apache-2.0 --dry-run
  Push; the repository is created if need be:
    lora-jax push runs/first/cells/run --repo=me/reviews --license=apache-2.0 --private
  To a branch of it:
    lora-jax push runs/first/cells/run --repo=me/reviews --license=apache-2.0 --revision=r8
  A base that the run read from a folder, under the name that others find it by:
    lora-jax push runs/mine/cells/run --repo=me/mine --license=mit --base-model=owner/base

The repository holds the adapter in PEFT's format, a model card made from the run's record, and the
record itself: settings, predictions of the test split, the trained arrays, and the cards of the
cells that were trained in one program with it. So `lora-jax pull` gives a folder for `verify`,
`predict` and `report`. Texts of the data never travel; paths of files in the settings do.

The token is that of `hf auth login`, or HF_TOKEN. What PEFT's format cannot hold (full fine-tuning,
BitFit, random subspaces) is an error: `lora-jax merge` writes the whole model instead.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("push", epilog=EXAMPLES)
    parser.add_argument("run", metavar="RUN", help="a finished run's WORKDIR/cells/NAME")
    parser.add_argument("--repo", required=True, metavar="OWNER/NAME", help="where to push")
    parser.add_argument(
        "--license", metavar="NAME", help="the adapter's licence, as apache-2.0; it must be given"
    )
    parser.add_argument("--private", action="store_true", help="create a private repository")
    add_hub(parser, "branch to push to, created if need be (default: main)")
    parser.add_argument(
        "--base-model", metavar="OWNER/NAME", help="the base's name on the hub (default: the run's)"
    )
    parser.add_argument(
        "--force", action="store_true", help="also to a repository of something else"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print files, sizes and card; send nothing"
    )
    options = parser.parse_args(argv)

    from lora_jax.hub import push

    pushed = push(
        options.run, options.repo, license=options.license, private=options.private,
        revision=options.revision, base_model=options.base_model, force=options.force,
        dry_run=options.dry_run,
    )  # fmt: skip
    if options.json:
        found = {"repo": pushed.repo, "files": dict(pushed.files), "notes": list(pushed.notes)}
        say(json.dumps({**found, "card": pushed.card, "url": pushed.url}))
        return 0
    for note in pushed.notes:
        tell(f"note: {note}")
    if options.dry_run:
        for name, size in pushed.files.items():
            say(f"{size:>12,}  {name}")
        say(f"{sum(pushed.files.values()):>12,}  bytes in {len(pushed.files)} files\n")
        say(pushed.card)
        say(f"nothing was sent; without --dry-run this goes to {pushed.repo}")
        return 0
    total = sum(pushed.files.values())
    say(f"{len(pushed.files)} files ({total:,} bytes) are in {pushed.repo}: {pushed.url}")
    return 0
