"""Reading a config with its overrides; what is wrong with it is an error in one line."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

import lora_jax.methods.registry  # noqa: F401  (the methods' own settings join)
from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.io.paths import read_path
from lora_jax.settings import SECTIONS, SETTINGS, Settings, flat_config
from lora_jax.settings.config import find_config, put_settings, run_file
from lora_jax.settings.described import described
from lora_jax.settings.fields import literal, parse, plain_value

ALL_SETTINGS = f"""\
All settings with their defaults:
{described()}"""


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
