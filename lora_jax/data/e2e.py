"""The E2E data set: sentences about restaurants from lists of their properties.

Novikova, Dušek & Rieser 2017 (arXiv:1706.09254), in the layout that the LoRA paper's code reads:
`name : Blue Spice | Type : pub | area : riverside||The Blue Spice is a pub by the river .`
"""

from pathlib import Path

from lora_jax.core.errors import RequestError
from lora_jax.data.examples import Examples, Splits, completion_examples, make_splits
from lora_jax.data.tables import nearest_name, read_lines

FILES = {"train": "train.txt", "validation": "valid.txt", "test": "test.txt"}
SEPARATOR = "||"


def load_e2e(path: str) -> Splits:
    """Prompts (the part before the bars) and completions of a folder's three files, in their order.

    White space around either is dropped, as there; several lines may share a prompt. Raises
    `RequestError` for a missing folder or file, a line without both parts, an empty file.
    """
    if not path:
        raise RequestError(
            f"data.source=e2e needs data.path: a folder with {', '.join(FILES.values())}"
        )
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise RequestError(
            f"data.path={path}: no such folder; it must hold {', '.join(FILES.values())}"
        )
    parts = {name: read_pairs(folder / file) for name, file in FILES.items()}
    prompts = {name: set(examples.texts) for name, examples in parts.items()}
    notes = [
        f"{shared} of {len(prompts[name])} {name} prompts are also in training"
        for name in ("validation", "test")
        if (shared := len(prompts[name] & prompts["train"]))
    ]
    return make_splits(
        parts["train"], parts["validation"], parts["test"], notes=notes, target="text"
    )


def read_pairs(path: Path) -> Examples:
    """The pairs of one file; ids are "file:line". Raises `RequestError` as `load_e2e` does."""
    if not path.is_file():
        there = sorted(file.name for file in path.parent.iterdir())
        raise RequestError(
            f"there is no {path}{nearest_name(path.name, there)}; data.path must hold "
            f"{', '.join(FILES.values())}"
        )
    prompts, completions, places = [], [], []
    for number, line in read_lines(path):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        prompt, bars, completion = (part.strip() for part in line.partition(SEPARATOR))
        if not bars:
            raise RequestError(
                f"{place}: no {SEPARATOR!r} in {line.strip()[:60]!r}; write properties, two bars, "
                "and the sentence"
            )
        for what, text in (("properties", prompt), ("sentence", completion)):
            if not text:
                raise RequestError(
                    f"{place}: no {what} next to the {SEPARATOR!r}; write one or remove the line"
                )
        prompts.append(prompt)
        completions.append(completion)
        places.append(place)
    if not prompts:
        raise RequestError(f"{path} holds no examples; give a file with lines in it")
    return completion_examples(prompts, completions, places)
