"""`lora-jax evaluate`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax.cli.requests import Parser, add_json, cell_of, say
from lora_jax.core.errors import RequestError

EXAMPLES = """\
Examples:
  lora-jax evaluate runs/first/cells/run
  lora-jax evaluate runs/first/cells/run --split=validation --json
  lora-jax evaluate runs/first/cells/run --merged     the adapter folded into the base: the same

A language model's own texts, before and after training, as the paper decodes E2E (0: all prompts):
  lora-jax evaluate runs/e2e/cells/run --texts=100 --num-beams=10 --length-penalty=0.9 \\
      --no-repeat-ngram=4
BLEU is sacrebleu's over all references of a prompt, ROUGE-L rouge_score's; every text is kept in
the cell's texts-SPLIT.json.

The data and the model are those of the run's config; its data must still have the same hash.
"""
NUM_SHOWN = 10


def run(argv: Sequence[str]) -> int:
    parser = Parser("evaluate", description="Loss and accuracy of a trained cell.", epilog=EXAMPLES)
    parser.add_argument("cell", help="a run's WORKDIR/cells/NAME")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--merged", action="store_true", help="merge first, then the plain model")
    texts = parser.add_argument_group("a language model's texts, in place of its loss")
    texts.add_argument("--texts", type=int, metavar="N", help="decode N prompts of the split")
    texts.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    texts.add_argument("--num-beams", type=int, default=1, metavar="N", help="default: 1, greedy")
    texts.add_argument("--length-penalty", type=float, default=1.0, metavar="X")
    texts.add_argument("--no-repeat-ngram", type=int, default=0, metavar="N")
    add_json(parser)
    options = parser.parse_args(argv)
    cell = cell_of(options.cell)
    if options.texts is not None:
        return _texts(cell, options)

    from lora_jax.train.again import evaluate_cell

    result, data_hash = evaluate_cell(cell, split=options.split, merged=options.merged)
    numbers = {
        "split": options.split,
        "loss": result.loss,
        "accuracy": result.accuracy,
        "n": result.num_examples,
        "data_hash": data_hash,
    }
    if options.json:
        say(json.dumps(numbers))
    else:
        say(
            f"{cell.name}: {options.split} loss {result.loss:.4f}, accuracy {result.accuracy:.4f} "
            f"({result.num_examples:,} examples)"
        )
    return 0


def _texts(cell: Path, options: Any) -> int:
    if options.texts < 0:
        raise RequestError(f"--texts={options.texts}; give a number of prompts, or 0 for all")
    from lora_jax.formats.atomic import write_json
    from lora_jax.generate import Decoding
    from lora_jax.generate.score import Questions, answer, score
    from lora_jax.train import enable_compilation_cache
    from lora_jax.train.again import load_cell

    settings = Decoding(
        options.max_new_tokens,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram,
    )
    enable_compilation_cache()
    _, adapted, splits = load_cell(cell)
    questions = Questions.of(getattr(splits, options.split), options.texts)
    found: dict[str, Any] = {}
    trees = {
        "base": adapted.model.params,
        cell.name: adapted.method.bind(adapted.trainable, adapted.frozen),
    }
    for name, params in trees.items():

        def show(done: int, name: str = name) -> None:
            print(f"{name}: {done} of {len(questions.prompts)} prompts", file=sys.stderr)

        texts = answer(adapted.model, params, questions.prompts, settings, show=show)
        found[name] = {"scores": score(questions, texts), "texts": texts}
    kept = {
        "split": options.split,
        "decoding": {
            "max_new_tokens": options.max_new_tokens,
            "num_beams": options.num_beams,
            "length_penalty": options.length_penalty,
            "no_repeat_ngram_size": options.no_repeat_ngram,
        },
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
