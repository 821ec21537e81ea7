"""`lora-jax evaluate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lora_jax as lj
from lora_jax.cli.parser import (
    MESH,
    Parser,
    add_decoding,
    add_mesh,
    decoding_given,
    mesh_of,
    say,
    tell,
)

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
DECODING = ("max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size")


def run(argv: Sequence[str]) -> int:
    parser = Parser("evaluate", epilog=EXAMPLES)
    parser.add_argument("cell", help="a run's WORKDIR/cells/NAME")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--merged", action="store_true", help="merge first, then the plain model")
    texts = parser.add_argument_group("a language model's texts, in place of its loss")
    texts.add_argument("--texts", type=int, metavar="N", help="decode N prompts of the split")
    add_decoding(texts, *DECODING)
    add_mesh(parser, "fsdp=8")
    options = parser.parse_args(argv)
    given = decoding_given(options)
    if given and options.texts is None:
        option = next(a for a in texts._group_actions if a.dest in given).option_strings[0]
        raise lj.RequestError(f"{option} is for texts; add --texts=N, or leave it out")

    from lora_jax.io.paths import cell_of

    cell = cell_of(options.cell)
    if options.texts is not None:
        if options.mesh:
            raise lj.RequestError("--mesh is for losses; texts are decoded on one device")
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
    head = read_json_file(cell / "config.json")["model"].get("head")
    scores = f"{cell.name}: {options.split} {describe_scores(numbers, head)}"
    say(json.dumps(numbers) if options.json else scores)
    return 0


def _texts(cell: Path, options: Any, given: dict[str, Any]) -> int:
    if options.texts < 0:
        raise lj.RequestError(f"--texts={options.texts}; give a number of prompts, or 0 for all")
    from lora_jax.generate.score import Questions, answer, score
    from lora_jax.io.atomic import write_json
    from lora_jax.train import enable_compilation_cache
    from lora_jax.train.evaluate_run import load_cell
    from lora_jax.train.workdir import check_inside

    check_inside(cell)  # the texts are written there
    settings = lj.Decoding(**{"max_new_tokens": 64, **given})
    enable_compilation_cache()
    _, adapted, splits = load_cell(cell)
    questions = Questions.of(getattr(splits, options.split), options.texts)
    params = adapted.params
    if options.merged:
        params = adapted.method.merge(adapted.trainable, adapted.frozen, dtype="stored")
    found: dict[str, Any] = {}
    for name, own in {"base": adapted.model.params, cell.name: params}.items():

        def show(done: int, name: str = name) -> None:
            tell(f"{name}: {done} of {len(questions.prompts)} prompts")

        texts = answer(adapted.model, own, questions.prompts, settings, show=show)
        found[name] = {"scores": score(questions, texts), "texts": texts}
    kept = {
        "split": options.split,
        "merged": options.merged,
        "decoding": {name: getattr(settings, name) for name in (*DECODING, "no_repeat_in_prompt")},
        "prompts": questions.prompts,
        "references": questions.references,
        "answers": found,
    }
    file = cell / f"texts-{options.split}.json"
    write_json(file, kept)
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
    say(f"all texts: {file}")
    return 0
