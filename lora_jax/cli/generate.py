"""`lora-jax generate`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lora_jax as lj
from lora_jax.cli.parser import (
    Parser,
    add_decoding,
    decoding_given,
    distinct_names,
    say,
    tell,
)

EXAMPLES = """\
Examples:
  One question to a chat model:
    lora-jax generate --model=smollm2-135m --chat --prompt="Why is the sky blue?"
  What adapters change, side by side, the base first: a run of this project, and a PEFT folder:
    lora-jax generate --model=smollm2-135m --adapter=runs/e2e/cells/run --adapter=peft/folder \\
        --prompt="name[The Mill], food[Indian]" --prompt="name[Aromi], food[French]"
  Beam search, as the paper decodes E2E:
    lora-jax generate --adapter=runs/e2e/cells/run --prompts-file=meanings.txt \\
        --num-beams=10 --length-penalty=0.9 --no-repeat-ngram=4 --repeat-prompt
  Draws instead of the most probable token (any of these four options turns drawing on):
    lora-jax generate --model=smollm2-135m --prompt="Once upon a time" \\
        --temperature=0.8 --top-k=50 --top-p=0.95 --seed=1

Answers go to standard output, progress and tokens/s (of all prompts together) to standard error.
A second start finds the compiled program on disk.
"""
BASE = "base"
# Prompts decoded at once; times the beams, what the cache must hold.
BATCH = 16


def run(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    prompts = _prompts(options)
    decoding = {"max_new_tokens": 64, **decoding_given(options)}
    if options.seed is not None or {"temperature", "top_k", "top_p"} & decoding.keys():
        decoding["do_sample"] = True
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise lj.RequestError(f"--seed={options.seed} must be at least 0 and below 2^63")

    import jax

    from lora_jax.data.completions import prompt_ids
    from lora_jax.generate import chat_prompt, encode_prompts, pad_left
    from lora_jax.serve.adapters import run_adapter
    from lora_jax.train import enable_compilation_cache

    settings = lj.Decoding(**decoding)
    enable_compilation_cache()
    runs = [path for path in options.adapter if run_adapter(path) is not None]
    first = _load(runs[0]) if runs else None
    if options.model is None and first is not None:
        model = first.model
    else:
        stacked = first is not None and getattr(first.model.config, "scan_layers", False)
        name = options.model or _base_of_first(options.adapter)
        model, first = lj.load_model(name, scan_layers=stacked), None
    asked = [chat_prompt(model, text) for text in prompts] if options.chat else prompts
    end = model.eos_token_id
    if runs and end is not None and not options.chat and not options.open_prompt:
        # As in training on pairs: the end of text says "now you".
        rows = [prompt_ids(model.tokenizer, text, eos_token_id=end) for text in asked]
        inputs = pad_left(rows, model.pad_token_id)
        tell("prompts end in the end of text, as in the run's training; --open-prompt: as given")
    else:
        inputs = encode_prompts(model, asked)
    key = jax.random.key(options.seed or 0)
    found = [_answer(model, model.params, BASE, None, inputs, settings, key)]
    _, *names = distinct_names([BASE, *(path.removesuffix("/adapter") for path in options.adapter)])
    for path, name in zip(options.adapter, names, strict=True):
        adapted = first if first is not None and path == runs[0] else _load(path, model)
        found.append(_answer(model, adapted.params, name, path, inputs, settings, key))
    if options.json:
        say(json.dumps({"model": model.name, "prompts": prompts, "answers": found}))
    elif len(found) > 1 and sys.stdout.isatty():
        _print_table(prompts, found)
    else:
        _print_lines(prompts, found)
    return 0


def _parser() -> Parser:
    parser = Parser("generate", epilog=EXAMPLES)
    add = parser.add_argument
    add("--model", metavar="NAME",
        help="a name, folder or hub id; default: the first adapter's own")  # fmt: skip
    add("--adapter", action="append", default=[], metavar="PATH",
        help="a run's WORKDIR/cells/NAME or its adapter/, or PEFT's; repeatable")  # fmt: skip
    add("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    add("--prompts-file", metavar="FILE", help="more prompts, one per line")
    add("--chat", action="store_true", help="put each prompt into the model's chat format (ChatML)")
    add("--open-prompt", action="store_true",
        help="continue prompts as they are, where a run's training ended them")  # fmt: skip
    add_decoding(parser, "max_new_tokens", "num_beams", "length_penalty", "no_repeat_ngram_size")
    sampled = parser.add_argument_group("drawing (any of them turns it on)")
    add_decoding(sampled, "temperature", "top_k", "top_p")
    sampled.add_argument("--seed", type=int, metavar="N", help="default: 0")
    return parser


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompts_file is not None:
        try:
            text = Path(options.prompts_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            place = f"--prompts-file={options.prompts_file}"
            raise lj.RequestError(f"cannot read {place}: {error}") from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise lj.RequestError("nothing to continue; give --prompt=TEXT or --prompts-file=FILE")
    return prompts


def _base_of_first(adapters: Sequence[str]) -> str:
    """The base that the first of some PEFT adapters names."""
    if not adapters:
        raise lj.RequestError("--model is missing; name the model, such as --model=smollm2-135m")
    from lora_jax.models.sources import find_adapter
    from lora_jax.serve.adapters import base_of

    return base_of(find_adapter(adapters[0]))


def _load(path: str, model: lj.Model | None = None) -> lj.Adapted:
    """An adapter with its language model, which is `model` where that is loaded already.

    Raises `RequestError` for a run of another task, and for one whose texts were encoded otherwise.
    """
    from lora_jax.serve.adapters import run_adapter
    from lora_jax.train.evaluate_run import check_completion_format

    adapted = lj.load_adapter(path, model)
    if run_adapter(path) is None:
        return adapted
    if adapted.model.head is not None or adapted.model.kind != "causal-lm":
        task = adapted.model.head or f"an {adapted.model.kind}"
        raise lj.RequestError(
            f"the adapter in {path} was trained for {task}, not for language; "
            "`lora-jax evaluate` scores it"
        )
    settings = adapted.description["model"]
    check_completion_format(adapted.description, adapted.model, settings, path)
    return adapted


def _answer(model, params, name: str, path: str | None, inputs, settings, key) -> dict[str, Any]:
    """What one set of parameters made of all prompts."""
    from lora_jax.generate import compile_first
    from lora_jax.generate.text import answer_batches

    tokens, mask = inputs
    size = min(BATCH, len(tokens))
    tell(f"{name}: compiling …")
    seconds = compile_first(model, params, tokens[:size], mask[:size], settings, key=key)
    tell(f"{name}: compiled in {seconds:.1f} s; answering …")
    start, texts, num_tokens = time.perf_counter(), [], 0
    for own, count in answer_batches(
        model, params, tokens, mask, settings, key=key, batch_size=size
    ):
        texts += own
        num_tokens += count
        if len(tokens) > size:
            tell(f"{name}: {len(texts)} of {len(tokens)} prompts")
    speed = num_tokens / (time.perf_counter() - start)
    tell(f"{name}: {num_tokens} tokens, {speed:.1f} tokens/s")
    answer = {"name": name, "adapter": path, "texts": texts, "tokens": num_tokens}
    return {**answer, "tokens_per_s": speed}


def _print_table(prompts: list[str], found: list[dict[str, Any]]) -> None:
    import rich.console
    import rich.table
    import rich.text

    from lora_jax.io.untrusted import printable

    table = rich.table.Table(show_lines=True)
    for title in ("prompt", *(one["name"] for one in found)):
        table.add_column(rich.text.Text(title), overflow="fold", ratio=1)
    for row in zip(prompts, *(one["texts"] for one in found), strict=True):
        # As text: a prompt may hold what rich takes for markup.
        table.add_row(*(rich.text.Text(printable(cell.strip())) for cell in row))
    rich.console.Console().print(table)


def _print_lines(prompts: list[str], found: list[dict[str, Any]]) -> None:
    if len(prompts) == len(found) == 1:
        say(found[0]["texts"][0])
        return
    for place, prompt in enumerate(prompts):
        say(f"{'' if place == 0 else chr(10)}> {prompt}")
        for one in found:
            mark = f"[{one['name']}] " if len(found) > 1 else ""
            say(f"{mark}{one['texts'][place].strip()}")
