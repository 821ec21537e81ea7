"""`lora-jax init`: a config to start from."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path

from lora_jax.cli.parser import Parser, say
from lora_jax.core.errors import RequestError
from lora_jax.core.nearest import nearest
from lora_jax.io.atomic import write_text
from lora_jax.io.paths import read_path
from lora_jax.settings.config import shipped_configs


def run(argv: Sequence[str]) -> int:
    configs = shipped_configs()
    width = max(map(len, configs))
    shipped = "\n".join(f"  {name.ljust(width)}  {_title(path)}" for name, path in configs.items())
    parser = Parser(
        "init",
        has_json=False,
        epilog=f"""\
Example:
  lora-jax init my.py                            (--like=what_rank copies that one)
  lora-jax train --config=my.py:smoke --workdir=runs/smoke      a tiny model, a minute
  lora-jax sweep --config=my.py --sweep=rank --workdir=runs/by_rank

These come with lora_jax, and are used by their names, as in --config=what_rank:
{shipped}
""",
    )
    parser.add_argument("file", metavar="FILE.py", help="the file to write; it must not exist")
    parser.add_argument(
        "--like", default="forkme", metavar="NAME", help="the config to copy (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    file = Path(read_path(options.file))
    if options.like not in configs:
        raise RequestError(f"no config is named {options.like!r}; {nearest(options.like, configs)}")
    if file.suffix != ".py":
        raise RequestError(f"{file} is no Python file; name it {file}.py")
    if file.exists():
        raise RequestError(f"{file} exists; give another name, or remove it")
    if not file.parent.is_dir():
        raise RequestError(f"folder {file.parent} does not exist; make it first")
    text = configs[options.like].read_text(encoding="utf-8")
    # A copy lies in another folder; its neighbours are found by one dot.
    write_text(file, text.replace("mine.py", file.name).replace("from ..", "from ."))
    say(f"{file} written; its settings: lora-jax inspect --config={file}")
    return 0


def _title(path: Path) -> str:
    docs = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return docs.partition("\n")[0]
