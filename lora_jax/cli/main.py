"""`lora-jax COMMAND …`: parse, call, print."""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence

import lora_jax
from lora_jax._public import needs_extra

COMMANDS = {
    "init": "write a config to start from, and list those that come with lora_jax",
    "train": "train one cell: a method on a model and data; resumes where it stopped",
    "sweep": "train every cell of a sweep; cells whose shapes agree train as one program",
    "evaluate": "loss and accuracy of a trained cell",
    "predict": "apply a finished run to new texts: classes, numbers or completions",
    "generate": "continue prompts with a model and with adapters on it, side by side",
    "merge": "fold a trained adapter into its base and write the model's folder",
    "convert": "write an adapter in PEFT's format, for peft, vLLM and others",
    "analyze": "what adapters learned: spectra, similarity of subspaces, ΔW against W",
    "plan": "the memory and time of a train step on a TPU slice, compiled here without one",
    "inspect": "what a method adapts: path, shape, rank, scale, trainable parameters",
    "verify": "train a finished cell again and compare, bit for bit",
    "push": "put a finished run on the Hugging Face Hub: adapter, model card, record",
    "pull": "fetch an adapter from the Hugging Face Hub, with its run's record",
    "cite": "BibTeX for a finished run or sweep, with its hash",
    "report": "one self-contained page: table, curves, accuracy and loss by method and rank",
}

EXAMPLES = """\
Start here:
  lora-jax inspect --config=reviews_minilm:lora
  lora-jax train   --config=reviews_minilm:lora --workdir=runs/first
  lora-jax report  runs/first

On your own texts (jsonl, csv, tsv or parquet; split and hashed for you):
  lora-jax train --config=reviews_minilm:lora --workdir=runs/mine \\
      --config.data.source=csv --config.data.path=reviews.csv \\
      --config.data.text=body --config.data.label=stars --config.model.num_labels=5

Talk to a language model, and to what was trained on it:
  lora-jax generate --model=smollm2-135m --chat --prompt="Why is the sky blue?"

Exit codes: 0 success; 1 "no, it differs"; 2 an error in the request; 130 stopped and saved.
"""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            "usage: lora-jax COMMAND [options]",
            "",
            "LoRA as a laboratory, in JAX.",
            "",
            *lines,
            "",
            "`lora-jax COMMAND --help` teaches each by example.",
            "",
            EXAMPLES,
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. A bad request is one line on stderr and code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    usual, warnings.formatwarning = warnings.formatwarning, _one_line
    try:
        if not argv or argv[0] in ("-h", "--help", "help"):
            print(usage(), flush=True)
            return 0
        if argv[0] == "--version":
            from lora_jax._versions import describe_version

            print(describe_version())
            return 0
        if argv[0] not in COMMANDS:
            from lora_jax.core.nearest import nearest

            raise lora_jax.RequestError(
                f"there is no command {argv[0]!r}; {nearest(argv[0], COMMANDS)}; "
                "see `lora-jax --help`"
            )
        # Each command imports what it needs: neither a typo nor --help should wait for JAX.
        return importlib.import_module(f"lora_jax.cli.{argv[0]}").run(argv[1:])
    except BrokenPipeError:  # `| head` has read enough; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("lora-jax: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if (answer := _answer_to(error, argv)) is None:
            raise
        code, line = answer
        print(f"lora-jax{line}", file=sys.stderr)
        return code
    finally:
        warnings.formatwarning = usual


def _answer_to(error: Exception, argv: Sequence[str]) -> tuple[int, str] | None:
    """The exit code, and what to say in one line; None for a defect of ours."""
    from lora_jax.io.untrusted import escaped

    if isinstance(error, ModuleNotFoundError) and (line := needs_extra(error)):
        return 2, f" {argv[0]}: {line}"
    if isinstance(error, lora_jax.RequestError):
        # A name or value in it may be a stranger's: escape codes and line ends.
        return 2, f": {escaped(' '.join(str(error).splitlines()))}"
    # Only the trainer's request to stop carries an exit code.
    code = getattr(error, "exit_code", None)
    return None if code is None else (code, f": {error}")


def _one_line(message, category, filename, lineno, line=None) -> str:
    """A warning in one line, without the place in our files and a stranger's escape codes."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", str(message))
    return f"lora-jax: warning: {' '.join(text.split())}\n"


if __name__ == "__main__":
    sys.exit(main())
