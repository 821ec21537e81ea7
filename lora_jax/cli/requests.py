"""What all commands share: reading a config with its overrides, and an error in one line."""

from __future__ import annotations

import argparse
import itertools
import reprlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

import lora_jax.methods.registry  # noqa: F401  (the methods' own settings join)
from lora_jax.core.errors import RequestError
from lora_jax.core.trees import nearest
from lora_jax.io.paths import at_home
from lora_jax.io.paths import cell_of as cell_of
from lora_jax.io.untrusted import printable
from lora_jax.settings import SECTIONS, SETTINGS, Settings, flat_config
from lora_jax.settings.config import find_config, put_settings, run_file
from lora_jax.settings.described import described
from lora_jax.settings.fields import literal, parse, plain_value

# Options that name a file or a folder.
PATHS = {
    "adapter", "adapters", "base", "beside", "cell", "data", "figures", "keep", "model", "out",
    "run", "workdir",
}  # fmt: skip

# What --mesh means, for the ends of --help.
MESH = """\
--mesh names axes whose sizes multiply to the number of devices. data: each device has rows of the
batch, and the whole base. fsdp: rows of the batch, and a part of every weight. tensor: a part of
every product. What comes out is the same but for rounding. Without accelerators it can be tried on
devices that share the processor: XLA_FLAGS=--xla_force_host_platform_device_count=8"""

OVERRIDES = (
    "Any setting of the config is a flag: --config.method.rank=4 --config.data.path=my.jsonl"
)
ALL_SETTINGS = f"""\
All settings with their defaults:
{described()}"""


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are `RequestError`s like all others."""

    def __init__(self, command: str, **options):
        super().__init__(
            prog=f"lora-jax {command}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def error(self, message: str):
        raise RequestError(f"{message}; see `{self.prog} --help`")

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
        return self.parse_args(mine), read_config(configs) if configs else None

    def parse_args(self, args=None, namespace=None):
        # Before argparse looks: it would complain of what a misspelt option leaves missing.
        options = [name for action in self._actions for name in action.option_strings]
        for arg in itertools.takewhile(lambda arg: arg != "--", args or ()):
            if arg.startswith("--") and (name := arg.partition("=")[0]) not in options:
                self.error(f"unknown argument {name!r}; {nearest(name, options)}")
        known, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]!r}; {nearest(unknown[0], options)}")
        for name in PATHS & vars(known).keys():
            value = getattr(known, name)
            for text in value if isinstance(value, list) else [value]:
                _check_names(name, text)
            value = [*map(read_path, value)] if isinstance(value, list) else read_path(value)
            setattr(known, name, value)
        return known


def _check_names(option: str, text: Any) -> None:
    """Raises `RequestError` for a path that no file system takes."""
    parts = text.split("/") if isinstance(text, str) else []
    if any("\0" in part or len(part.encode("utf-8", "replace")) > 255 for part in parts):
        raise RequestError(
            f"{option} {reprlib.repr(text)} is no path: a name in it is longer than 255 bytes or "
            "holds NUL"
        )


def read_path(text: Any) -> Any:
    """A path as given, with `~` as the home folder; raises as `at_home`."""
    if not isinstance(text, str):
        return text
    path = at_home(text)
    return text if path == Path(text) else str(path)


def read_config(args: Sequence[str]) -> Settings:
    """The settings of `--config=FILE.py:arg` with `--config.key=value` overrides.

    Raises `RequestError` for a missing file, an unknown key (nearest named), or a value of another
    type or out of range.
    """
    name = config_name(args)
    config = _load(name)
    if not isinstance(config, ConfigDict):
        raise RequestError(
            f"get_config of {name} returns {config!r}; return an ml_collections.ConfigDict"
        )
    own = flat_config(config.to_dict())
    known = list(dict.fromkeys([*own, *SETTINGS]))
    put_settings(config, {key: _value_of(key, text, own, known) for key, text in _overrides(args)})
    made = Settings.from_config(config)
    flat = made.flat()
    paths = [key for key, setting in SETTINGS.items() if setting.kind == "path" and flat.get(key)]
    made = made.replace({key: read_path(flat[key]) for key in paths})
    made.check()
    return made


def _load(name: str) -> Any:
    """What `get_config` of "FILE.py[:arg]" returns; `RequestError` names the line at fault."""
    file, _, arg = name.partition(":")
    path = find_config(file)
    try:
        functions = run_file(path)
        if "get_config" not in functions:
            raise RequestError(f"{file} has no function get_config; it returns the ConfigDict")
        return functions["get_config"](*([arg] if arg else []))
    except RequestError:
        raise
    except SyntaxError as error:
        raise RequestError(f"{error.filename}:{error.lineno}: {error.msg}") from error
    except Exception as error:
        frames = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        mine = [place for place in frames if place[0] == str(path.resolve())] or frames
        kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
        message = f"{kind.removeprefix('ValueError: ')}{' '.join(str(error).split())}"
        raise RequestError(f"{mine[-1][0]}:{mine[-1][1]}: {message}") from error


def _overrides(args: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """`(key, text)` of each `--config.key=text` or `--config.key text`; None where no text is."""
    words = list(args)
    while words:
        word = words.pop(0)
        key, equals, text = word.removeprefix("--config.").partition("=")
        has_value = bool(words) and not words[0].startswith("--")
        if word.startswith("--config."):
            yield key, text if equals else words.pop(0) if has_value else None
        elif word == "--config" and has_value:
            words.pop(0)
        elif not word.startswith("--config="):
            raise RequestError(f"unknown argument {word!r}; settings look like --config.key=value")


def _value_of(key: str, text: str | None, own: Mapping[str, Any], known: Sequence[str]) -> Any:
    """The value of an override: by the schema, or by the type of a setting of the config's own."""
    if key not in known:
        raise RequestError(f"the config has no setting {key!r}; {nearest(key, known)}")
    facts = SETTINGS.get(key)
    if text is None and (facts.kind == "flag" if facts else isinstance(own[key], bool)):
        text = "true"
    if text is None:
        shown = facts.shown if facts else own[key]
        raise RequestError(f"--config.{key} needs a value: --config.{key}={shown}")
    if facts:
        return parse(key, text, facts)
    value = text if isinstance(own[key], str) else literal(text)
    value = float(value) if isinstance(own[key], float) and type(value) is int else value
    if own[key] is not None and not isinstance(plain_value(value), type(plain_value(own[key]))):
        raise RequestError(f"{key}={value!r} has another type than the config's {own[key]!r}")
    return value


def config_file(args: Sequence[str]) -> str:
    """The path in `--config=FILE.py[:arg]`."""
    return config_name(args).partition(":")[0]


def config_name(args: Sequence[str]) -> str:
    """What `--config=` names: "FILE.py" or "FILE.py:arg"."""
    for place, arg in enumerate(args):
        if arg.startswith("--config="):
            return read_path(arg.removeprefix("--config="))
        if arg == "--config" and place + 1 < len(args):
            return read_path(args[place + 1])
    raise RequestError(f"{args[0]} needs the file it changes: --config=FILE.py[:arg]")


def add_json(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


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
        raise RequestError(
            f"--mesh={options.mesh} is for the devices of one process, and there are "
            f"{jax.process_count()}; begin one process a host, each with its own part of the sweep "
            "(--only) and a workdir"
        )
    sizes = read_mesh(options.mesh)
    if sizes["cell"] > 1 and not has_cells:
        raise RequestError(f"--mesh={options.mesh}: cell is for a sweep; here there is one cell")
    return make_mesh(sizes)


def needs_config(
    config: Settings | None, command: str, *, sections: tuple[str, ...] = SECTIONS
) -> Settings:
    """The config. Raises `RequestError` if there is none, or its `sections` lack settings."""
    if config is None:
        raise RequestError(
            f"{command} needs a config: --config=reviews_minilm:lora, or one of your own "
            "(`lora-jax init my.py` writes one to start from)"
        )
    config.check_complete(sections)
    return config


def say(text: str) -> None:
    text = printable(text).encode("utf-8", "backslashreplace").decode()
    print(text, file=sys.stdout, flush=True)
