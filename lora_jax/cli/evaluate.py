"""`lora-jax evaluate`."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.cli.requests import MESH, Parser, add_json, add_mesh, cell_of, mesh_of, say
from lora_jax.core.errors import RequestError

EXAMPLES = f"""\
Examples:
  lora-jax evaluate runs/first/cells/run
  lora-jax evaluate runs/first/cells/run --split=validation --json
  lora-jax evaluate runs/first/cells/run --merged     the adapter folded into the base: the same

A language model's own texts, before and after training, as the paper decodes E2E (0: all prompts):
  lora-jax evaluate runs/e2e/cells/run --texts=100 --num-beams=10 --length-penalty=0.9 \\
      --no-repeat-ngram=4 --repeat-prompt
BLEU is sacrebleu's over all references of a prompt, ROUGE-L rouge_score's; every text is kept in
the cell's texts-SPLIT.json.

The data and the model are those of the run's config; its data must still have the same hash.
A batch of evaluation whose rows a mesh does not divide is worked out whole on every device.

{MESH}
"""
NUM_SHOWN = 10
# Options of decoding, and what `Decoding` calls them.
_DECODING = {
    "max_new_tokens": "max_new_tokens",
    "num_beams": "num_beams",
    "length_penalty": "length_penalty",
    "no_repeat_ngram": "no_repeat_ngram_size",
    "no_repeat_in_prompt": "no_repeat_in_prompt",
}


def run(argv: Sequence[str]) -> int:
    parser = Parser("evaluate", description="Loss and accuracy of a trained cell.", epilog=EXAMPLES)
    parser.add_argument("cell", help="a run's WORKDIR/cells/NAME")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--merged", action="store_true", help="merge first, then the plain model")
    texts = parser.add_argument_group("a language model's texts, in place of its loss")
    texts.add_argument("--texts", type=int, metavar="N", help="decode N prompts of the split")
    texts.add_argument("--max-new-tokens", type=int, metavar="N", help="default: 64")
    texts.add_argument("--num-beams", type=int, metavar="N", help="default: 1, greedy")
    texts.add_argument("--length-penalty", type=float, metavar="X", help="default: 1")
    texts.add_argument("--no-repeat-ngram", type=int, metavar="N", help="default: 0, none")
    texts.add_argument(
        "--repeat-prompt",
        dest="no_repeat_in_prompt",
        action="store_const",
        const=False,
        help="what stands in the prompt may come again, as in the paper's decoder",
    )
    add_mesh(parser, "fsdp=8")
    add_json(parser)
    options = parser.parse_args(argv)
    given = {name: value for name in _DECODING if (value := getattr(options, name)) is not None}
    if given and options.texts is None:
        option = f"--{next(iter(given)).replace('_', '-')}".replace("no-repeat-in", "repeat")
        raise RequestError(f"{option} is for texts; add --texts=N, or leave it out")
    cell = cell_of(options.cell)
    if options.texts is not None:
        if options.mesh:
            raise RequestError("--mesh is for losses; texts are decoded on one device")
        return _texts(cell, options, given)

    from lora_jax.train.evaluate_run import evaluate_cell
    from lora_jax.train.task_metrics import describe_scores
    from lora_jax.train.workdir import read_json_file
    from lora_jax.train.write_results import measure

    result, splits = evaluate_cell(
        cell, split=options.split, merged=options.merged, mesh=mesh_of(options)
    )
    numbers = {
        "split": options.split,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "n": result.num_examples,
        **measure(result, splits.metrics),
        "data_hash": splits.data_hash,
    }
    if options.json:
        say(json.dumps(numbers))
    else:
        head = read_json_file(cell / "config.json")["model"].get("head")
        say(f"{cell.name}: {options.split} {describe_scores(numbers, head)}")
    return 0


def _texts(cell: Path, options: Any, given: dict[str, Any]) -> int:
    if options.texts < 0:
        raise RequestError(f"--texts={options.texts}; give a number of prompts, or 0 for all")
    from lora_jax.generate import Decoding
    from lora_jax.generate.score import Questions, answer, score
    from lora_jax.io.atomic import write_json
    from lora_jax.train import enable_compilation_cache
    from lora_jax.train.evaluate_run import load_cell
    from lora_jax.train.workdir import check_inside

    check_inside(cell)  # the texts are written there
    given = {"max_new_tokens": 64, **given}
    settings = Decoding(**{_DECODING[name]: value for name, value in given.items()})
    enable_compilation_cache()
    _, adapted, splits = load_cell(cell)
    questions = Questions.of(getattr(splits, options.split), options.texts)
    trained = adapted.method.bind
    if options.merged:
        trained = functools.partial(adapted.method.merge, dtype="stored")
    found: dict[str, Any] = {}
    trees = {
        "base": adapted.model.params,
        cell.name: trained(adapted.trainable, adapted.frozen),
    }
    for name, params in trees.items():

        def show(done: int, name: str = name) -> None:
            print(f"{name}: {done} of {len(questions.prompts)} prompts", file=sys.stderr)

        texts = answer(adapted.model, params, questions.prompts, settings, show=show)
        found[name] = {"scores": score(questions, texts), "texts": texts}
    kept = {
        "split": options.split,
        "merged": options.merged,
        "decoding": {name: getattr(settings, name) for name in _DECODING.values()},
        "prompts": questions.prompts,
        "references": questions.references,
        "answers": found,
    }
    write_json(cell / f"texts-{options.split}.json", kept)
    if options.json:
        say(json.dumps({name: one["scores"] for name, one in found.items()}))
        return 0
    step = max(1, len(questions.prompts) // NUM_SHOWN)
    for place in range(0, len(questions.prompts), step)[:NUM_SHOWN]:
        say(f"\n{questions.prompts[place]}")
        for name, one in found.items():
            say(f"  {name}: {one['texts'][place]}")
        say(f"  reference: {questions.references[place][0]}")
    say("")
    for name, one in found.items():
        scores = one["scores"]
        say(
            f"{name}: BLEU {scores['bleu']:.1f}, in any case {scores['bleu_any_case']:.1f}, "
            f"ROUGE-L {scores['rouge_l']:.1f} ({scores['n']} prompts of {options.split})"
        )
    say(f"all texts: {cell / f'texts-{options.split}.json'}")
    return 0
