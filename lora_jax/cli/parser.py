"""What all commands share: a parser of options, and text for the terminal."""

from __future__ import annotations

import argparse
import itertools
import reprlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lora_jax as lj
from lora_jax.cli.main import COMMANDS

# Options that name a file or a folder.
PATHS = {
    "adapter", "adapters", "base", "beside", "cell", "data", "figures", "keep", "model", "out",
    "run", "workdir",
}  # fmt: skip

# What --mesh means, for the ends of --help.
MESH = """\
--mesh names axes whose sizes multiply to the number of devices. data: each device has rows of the
batch, and the whole base. fsdp: rows of the batch, and a part of every weight. tensor: a part of
every product. The results are the same up to rounding. Without accelerators it can be tried on
devices that share the processor: XLA_FLAGS=--xla_force_host_platform_device_count=8"""

OVERRIDES = (
    "Any setting of the config is a flag: --config.method.rank=4 --config.data.path=my.jsonl"
)

# Options of decoding, by the fields of `Decoding`.
DECODING = {
    "max_new_tokens": ("--max-new-tokens", int, "default: 64"),
    "num_beams": ("--num-beams", int, "beam search; default: 1, greedy"),
    "length_penalty": (
        "--length-penalty", float, "of beams: score = log-probability / length^X; default: 1",
    ),
    "no_repeat_ngram_size": (
        "--no-repeat-ngram", int, "no run of N tokens twice; default: 0, none",
    ),
    "temperature": ("--temperature", float, "default: 1"),
    "top_k": ("--top-k", int, "keep the N most probable tokens"),
    "top_p": ("--top-p", float, "keep tokens that make up X"),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """The options of one command, `--json` among them; errors are `RequestError`s like all others.

    Its file is imported for `--help`, too, which should not wait for JAX: what it needs of the rest
    of the package is imported within its functions.
    """

    def __init__(self, command: str, *, has_json: bool = True, **options: Any):
        about = COMMANDS.get(command, "")
        super().__init__(
            prog=f"lora-jax {command}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **{"description": f"{about[:1].upper()}{about[1:]}.", **options},
        )
        if has_json:
            self.add_argument(
                "--json", action="store_true", help="print the result as one JSON object"
            )

    def error(self, message: str):
        raise lj.RequestError(f"{message}; see `{self.prog} --help`")

    def parse_with_config(self, argv: Sequence[str]):
        """`(options, config)`: `--config…` arguments make the config, the rest the options."""
        mine, configs, taking = [], [], False
        for arg in argv:
            is_config = arg == "--config" or arg.startswith(("--config=", "--config."))
            if is_config or (taking and not arg.startswith("--")):
                configs.append(arg)
                taking = is_config and "=" not in arg
            else:
                mine.append(arg)
                taking = False
        options = self.parse_args(mine)
        if not configs:
            return options, None
        from lora_jax.cli.requests import read_config

        return options, read_config(configs)

    def parse_args(self, args=None, namespace=None):
        # Before argparse looks: it would complain of what a misspelt option leaves missing.
        options = [name for action in self._actions for name in action.option_strings]
        for arg in itertools.takewhile(lambda arg: arg != "--", args or ()):
            if arg.startswith("--") and arg.partition("=")[0] not in options:
                self._refuse(arg.partition("=")[0], options)
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown[0], options)
        from lora_jax.io.paths import read_path

        for name in PATHS & vars(known).keys():
            value = getattr(known, name)
            for text in value if isinstance(value, list) else [value]:
                _check_names(name, text)
            value = [*map(read_path, value)] if isinstance(value, list) else read_path(value)
            setattr(known, name, value)
        return known

    def _refuse(self, name: str, options: Sequence[str]):
        from lora_jax.core.nearest import nearest

        self.error(f"unknown argument {name!r}; {nearest(name, options)}")


def _check_names(option: str, text: Any) -> None:
    """Raises `RequestError` for a path that no file system takes."""
    parts = text.split("/") if isinstance(text, str) else []
    if any("\0" in part or len(part.encode("utf-8", "replace")) > 255 for part in parts):
        raise lj.RequestError(
            f"{option} {reprlib.repr(text)} is no path: a name in it is longer than 255 bytes or "
            "holds NUL"
        )


def add_mesh(parser: Parser, axes: str) -> None:
    """`--mesh`; `axes` says by an example what it is for here."""
    parser.add_argument(
        "--mesh",
        default="",
        metavar="AXIS=N,…",
        help=f"over all devices, as {axes} (default: one device); see the end",
    )


def mesh_of(options: argparse.Namespace, *, has_cells: bool = False) -> Any:
    """The mesh of `--mesh`, None without it; with an axis of cells only where there are several.

    Raises `RequestError`.
    """
    if not options.mesh:
        return None
    import jax

    from lora_jax.parallel.mesh import make_mesh, read_mesh

    if jax.process_count() > 1:
        raise lj.RequestError(
            f"--mesh={options.mesh} is for the devices of one process, and there are "
            f"{jax.process_count()}; begin one process a host, each with its own part of the sweep "
            "(--only) and a workdir"
        )
    sizes = read_mesh(options.mesh)
    if sizes["cell"] > 1 and not has_cells:
        raise lj.RequestError(f"--mesh={options.mesh}: cell is for a sweep; here there is one cell")
    return make_mesh(sizes)


def add_track(parser: Parser) -> None:
    """`--track`: an option, not a setting.

    Where metrics go is a matter of the person who runs a command, and of their account: a config
    that others run must not hold it, and the card of a run is the same with it and without.
    """
    parser.add_argument(
        "--track",
        action="append",
        default=[],
        metavar="NAME[:PROJECT]",
        help="also send metrics to wandb, trackio or mlflow, one run per cell; may be repeated "
        "(TensorBoard's files are always written)",
    )


def trackers_of(options: argparse.Namespace) -> list[Any]:
    """The trackers of `--track`, checked before anything is trained. Raises `RequestError`."""
    if not options.track:
        return []
    from lora_jax.trackers import make_tracker

    return [make_tracker(text) for text in dict.fromkeys(options.track)]


def add_decoding(group: Any, *names: str) -> None:
    """Options of decoding: those of these fields of `Decoding`; what is not given is None."""
    for name in names:
        option, kind, about = DECODING[name]
        mark = "N" if kind is int else "X"
        group.add_argument(option, dest=name, type=kind, metavar=mark, help=about)
    if "no_repeat_ngram_size" in names:
        group.add_argument(
            "--repeat-prompt", dest="no_repeat_in_prompt", action="store_const", const=False,
            help="n-grams of the prompt may come again, as in the paper's decoder",
        )  # fmt: skip


def decoding_given(options: argparse.Namespace) -> dict[str, Any]:
    """The settings of decoding that were given, by their names in `Decoding`."""
    given = {name: getattr(options, name, None) for name in (*DECODING, "no_repeat_in_prompt")}
    return {name: value for name, value in given.items() if value is not None}


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of some paths that tell them apart.

    >>> distinct_names(["runs/a/adapter", "runs/b/adapter/"])
    ['a/adapter', 'b/adapter']
    """
    parts = [[part for part in Path(path).parts if part != "/"] for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def say(text: str) -> None:
    """Prints it without escape codes that a stranger's file may hold."""
    print(_inert(text), file=sys.stdout, flush=True)


def tell(text: str) -> None:
    """`say` on standard error, for progress."""
    print(_inert(text), file=sys.stderr, flush=True)


def _inert(text: str) -> str:
    from lora_jax.io.untrusted import printable

    return printable(text).encode("utf-8", "backslashreplace").decode()


class _NoToken(argparse.Action):
    """Refuses a token: other users of the machine see command lines, and shells keep them."""

    def __call__(self, parser, namespace, values, option_string=None):
        parser.error(
            "--token would leave the token in the shell's history; log in once with `hf auth "
            "login`, or set HF_TOKEN"
        )


def add_hub(parser: Parser, revision: str) -> None:
    """Options for a repository of the Hugging Face Hub; `revision` says what one is here."""
    parser.add_argument("--revision", metavar="NAME", help=revision)
    parser.add_argument("--token", nargs="?", action=_NoToken, help=argparse.SUPPRESS)


def add_peft_base(parser: Parser) -> None:
    """Options for the base of an adapter in PEFT's format."""
    parser.add_argument(
        "--model", help="the base of a PEFT adapter, where its config names no good"
    )
    parser.add_argument(
        "--untie", action="store_true", help="give a tied base's head a kernel of its own"
    )
