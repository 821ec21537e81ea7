"""`lora-jax generate`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_jax.cli.requests import Parser, add_json, say
from lora_jax.core.errors import RequestError
from lora_jax.io.untrusted import printable

if TYPE_CHECKING:
    from lora_jax.generate import Decoding
    from lora_jax.models import Model
    from lora_jax.train import Adapted

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


@dataclasses.dataclass(frozen=True)
class Answers:
    """What one set of parameters made of all prompts."""

    name: str
    adapter: str | None
    texts: list[str]
    num_tokens: int
    seconds: float

    @property
    def tokens_per_s(self) -> float:
        return self.num_tokens / self.seconds


def run(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    prompts = _prompts(options)
    sampling = _sampling(options)
    if options.seed is not None and not 0 <= options.seed < 2**63:
        raise RequestError(f"--seed={options.seed} must be at least 0 and below 2^63")

    import jax

    from lora_jax.data.completions import prompt_ids
    from lora_jax.generate import Decoding, chat_prompt, encode_prompts, pad_left
    from lora_jax.models import load_model
    from lora_jax.serve.adapters import run_adapter
    from lora_jax.train import enable_compilation_cache

    settings = Decoding(
        options.max_new_tokens,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
        no_repeat_ngram_size=options.no_repeat_ngram,
        no_repeat_in_prompt=not options.repeat_prompt,
        **sampling,
    )
    enable_compilation_cache()
    runs = [folder for path in options.adapter if (folder := run_adapter(path)) is not None]
    known = {runs[0]: _load_run(runs[0])} if runs else {}
    if options.model is None and not runs:
        options.model = _base_of_first(options.adapter)
    stacked = bool(runs) and getattr(known[runs[0]].model.config, "scan_layers", False)
    if options.model is not None:
        model = load_model(options.model, scan_layers=stacked)
    else:
        model = known[runs[0]].model
    asked = [chat_prompt(model, text) for text in prompts] if options.chat else prompts
    if runs and not options.chat and not options.open_prompt:
        # As in training on pairs: the end of text says "now you".
        rows = [prompt_ids(model.tokenizer, p, eos_token_id=model.eos_token_id) for p in asked]
        inputs = pad_left(rows, model.pad_token_id)
        _tell("prompts end in the end of text, as in the run's training; --open-prompt: as given")
    else:
        inputs = encode_prompts(model, asked)
    key = jax.random.key(options.seed or 0)
    found = [_answer(model, model.params, BASE, None, inputs, settings, key)]
    names = _names(options.adapter)
    for path, name in zip(options.adapter, names, strict=True):
        params = _bound(model, path, known)
        found.append(_answer(model, params, name, path, inputs, settings, key))
    if options.json:
        say(json.dumps(_as_json(model, prompts, found)))
    elif len(found) > 1 and sys.stdout.isatty():
        _print_table(prompts, found)
    else:
        _print_lines(prompts, found)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "generate",
        description="Continue prompts with a model and with adapters on it, side by side.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add(
        "--model", metavar="NAME", help="a name, folder or hub id; default: the first adapter's own"
    )
    add("--adapter", action="append", default=[], metavar="PATH",
        help="a run's WORKDIR/cells/NAME or its adapter/, or PEFT's; repeatable")  # fmt: skip
    add("--prompt", action="append", default=[], metavar="TEXT", help="repeatable")
    add("--prompts-file", metavar="FILE", help="more prompts, one a line")
    add("--chat", action="store_true", help="put each prompt into the model's chat format (ChatML)")
    add("--open-prompt", action="store_true",
        help="continue prompts as they are, where a run's training ended them")  # fmt: skip
    add("--max-new-tokens", type=int, default=64, metavar="N", help="default: 64")
    add("--num-beams", type=int, default=1, metavar="N", help="beam search; default: 1, greedy")
    add("--length-penalty", type=float, default=1.0, metavar="X",
        help="of beams: score = log-probability / length^X; default: 1")  # fmt: skip
    add("--no-repeat-ngram", type=int, default=0, metavar="N", help="no run of N tokens twice")
    add("--repeat-prompt", action="store_true",
        help="but what stands in the prompt may come again, as the paper decodes")  # fmt: skip
    sampled = parser.add_argument_group("drawing (any of them turns it on)")
    sampled.add_argument("--temperature", type=float, metavar="X", help="default: 1")
    sampled.add_argument("--top-k", type=int, metavar="N", help="keep the N most probable tokens")
    sampled.add_argument("--top-p", type=float, metavar="X", help="keep tokens that make up X")
    sampled.add_argument("--seed", type=int, metavar="N", help="default: 0")
    add_json(parser)
    return parser


def _prompts(options: argparse.Namespace) -> list[str]:
    prompts = list(options.prompt)
    if options.prompts_file is not None:
        try:
            text = Path(options.prompts_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            place = f"--prompts-file={options.prompts_file}"
            raise RequestError(f"cannot read {place}: {error}") from error
        prompts += [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise RequestError("nothing to continue; give --prompt=TEXT or --prompts-file=FILE")
    return prompts


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of drawing: none of them unless one of its options was given."""
    given = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.seed is None and not given:
        return {}
    return {"do_sample": True, **given}


def _base_of_first(adapters: Sequence[str]) -> str:
    """The base that the first of some PEFT adapters names."""
    if not adapters:
        raise RequestError("--model is missing; name the model, such as --model=smollm2-135m")
    from lora_jax.models.sources import find_adapter
    from lora_jax.serve.adapters import base_of

    return base_of(find_adapter(adapters[0]))


def _bound(model: Model, path: str, known: dict[Path, Adapted]) -> Any:
    """The parameters of `model` with the adapter on them; `known` runs are not loaded again."""
    from lora_jax.serve.adapters import load_adapter, run_adapter

    folder = run_adapter(path)
    if folder is None:
        return load_adapter(path, model).params

    adapted = known[folder] if folder in known else _load_run(folder)
    if adapted.model.base_hash != model.base_hash:
        raise RequestError(
            f"the adapter in {path} was trained on {adapted.model.name!r}, whose weights are not "
            f"those of --model={model.name}; leave --model out, or name that one"
        )
    if adapted.model.config != model.config:
        raise RequestError(
            f"the run in {path} was trained with another model.scan_layers than the first one; ask "
            "them one by one, or `lora-jax convert` it"
        )
    # On the weights that are there already: the copy that came with the run can go.
    return adapted.method.bind(adapted.trainable, model.params)


def _load_run(folder: Path) -> Adapted:
    """A run's adapter with its language model.

    Raises `RequestError` for a run of another task, and for one whose texts were encoded otherwise.
    """
    from lora_jax.train.adapted import load_run_adapter
    from lora_jax.train.evaluate_run import check_completion_format

    adapted = load_run_adapter(folder)
    if adapted.model.head is not None or adapted.model.kind != "causal-lm":
        task = adapted.model.head or f"an {adapted.model.kind}"
        raise RequestError(
            f"the adapter in {folder} was trained for {task}, not for language; "
            "`lora-jax evaluate` scores it"
        )
    settings = adapted.description["model"]
    check_completion_format(adapted.description, adapted.model, settings, str(folder))
    return adapted


def _names(paths: Sequence[str]) -> list[str]:
    """The last part of each path that tells it from the others; the whole where none does."""
    short = [p.parent.name if p.name == "adapter" else p.name for p in map(Path, paths)]
    taken = [BASE, *short]
    return [n if taken.count(n) == 1 else p for n, p in zip(short, paths, strict=True)]


def _answer(
    model: Model,
    params: Any,
    name: str,
    path: str | None,
    inputs: Any,
    settings: Decoding,
    key: Any,
) -> Answers:
    from lora_jax.generate import compile_first
    from lora_jax.generate.text import answer_batches

    tokens, mask = inputs
    size = min(BATCH, len(tokens))
    _tell(f"{name}: compiling …")
    seconds = compile_first(model, params, tokens[:size], mask[:size], settings, key=key)
    _tell(f"{name}: compiled in {seconds:.1f} s; answering …")
    start, texts, num_tokens = time.perf_counter(), [], 0
    for own, count in answer_batches(
        model, params, tokens, mask, settings, key=key, batch_size=size
    ):
        texts += own
        num_tokens += count
        if len(tokens) > size:
            _tell(f"{name}: {len(texts)} of {len(tokens)} prompts")
    answers = Answers(name, path, texts, num_tokens, time.perf_counter() - start)
    _tell(f"{name}: {num_tokens} tokens, {answers.tokens_per_s:.1f} tokens/s")
    return answers


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _as_json(model: Model, prompts: list[str], found: list[Answers]) -> dict[str, Any]:
    answers = [
        {
            "name": one.name,
            "adapter": one.adapter,
            "texts": one.texts,
            "tokens": one.num_tokens,
            "tokens_per_s": one.tokens_per_s,
        }
        for one in found
    ]
    return {"model": model.name, "prompts": prompts, "answers": answers}


def _print_table(prompts: list[str], found: list[Answers]) -> None:
    import rich.console
    import rich.table
    import rich.text

    table = rich.table.Table(show_lines=True)
    for title in ("prompt", *(one.name for one in found)):
        table.add_column(rich.text.Text(title), overflow="fold", ratio=1)
    for row in zip(prompts, *(one.texts for one in found), strict=True):
        # As text: a prompt may hold what rich takes for markup.
        table.add_row(*(rich.text.Text(printable(cell.strip())) for cell in row))
    rich.console.Console().print(table)


def _print_lines(prompts: list[str], found: list[Answers]) -> None:
    if len(prompts) == len(found) == 1:
        say(found[0].texts[0])
        return
    for place, prompt in enumerate(prompts):
        say(f"{'' if place == 0 else chr(10)}> {prompt}")
        for one in found:
            mark = f"[{one.name}] " if len(found) > 1 else ""
            say(f"{mark}{one.texts[place].strip()}")
