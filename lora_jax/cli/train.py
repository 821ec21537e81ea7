"""`lora-jax train`."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import lora_jax as lj
from lora_jax.cli.parser import (
    MESH,
    OVERRIDES,
    Parser,
    add_mesh,
    add_track,
    mesh_of,
    say,
    trackers_of,
)
from lora_jax.cli.requests import ALL_SETTINGS, config_name, needs_config

if TYPE_CHECKING:
    from lora_jax.train.record import Card

EXAMPLES = f"""\
{OVERRIDES}

Examples:
  LoRA of rank 8 on query and value, on the embedded model and reviews:
    lora-jax train --config=reviews_minilm:lora --workdir=runs/first

  Rank 1 on every linear layer:
    lora-jax train --config=reviews_minilm:lora --workdir=runs/first --name=r1 \\
        --config.method.targets=all-linear --config.method.rank=1

  Your own model folder (Hugging Face layout) and texts:
    lora-jax train --config=reviews_minilm:lora --workdir=runs/mine \\
        --config.model.name=path/to/model --config.model.num_labels=3 \\
        --config.data.source=jsonl --config.data.path=texts.jsonl

Stop it with Ctrl-C, or kill it: the same command goes on where it was, and the weights at the end
are those of a run that was never stopped. Results: WORKDIR/cells/NAME/card.json, metrics.jsonl,
adapter/; TensorBoard: tensorboard --logdir WORKDIR; others: --track=wandb.

{ALL_SETTINGS}

{MESH}
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("train", epilog=EXAMPLES)
    parser.add_argument("--config", metavar="FILE.py[:arg]", help="the experiment (required)")
    parser.add_argument("--workdir", required=True, help="folder of the runs")
    parser.add_argument("--name", default="run", help="the cell's name in it (default: run)")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    add_track(parser)
    add_mesh(parser, "fsdp=4,tensor=2")
    options, config = parser.parse_with_config(argv)
    config = needs_config(config, "train")

    card = lj.train(
        config, options.workdir, options.name, progress=not options.no_progress,
        command=shlex.join(["lora-jax", "train", *argv]), config_file=config_name(argv),
        mesh=mesh_of(options), trackers=trackers_of(options),
    )  # fmt: skip
    said = summary(card, options.workdir, options.name)
    say(json.dumps(card.to_json()) if options.json else said)
    return 0


def summary(card: Card, workdir: str, name: str) -> str:
    """The result in three lines, and the command that shows more."""
    from lora_jax.train.task_metrics import describe_scores

    metrics, counts = card.metrics, card.counts
    scores = describe_scores(metrics.test.to_json(), card.config["model"].get("head"))
    return "\n".join(
        [
            f"{name}: test {scores}, with the weights of step {metrics.validation.best_step}",
            f"{counts.adapter:,} adapter parameters and {counts.head:,} of the head, "
            f"{metrics.adapter_bytes:,} bytes; {metrics.stopped}",
            f"in {workdir}/cells/{name}; see it: lora-jax report {shlex.quote(str(workdir))}",
        ]
    )
