"""What a train step takes at the real sizes: GPT-3 175B, Llama 7B and 65B, compiled for TPU slices.

    make plans                                            # an hour of two processors, no TPU
    python -m experiments.bench.plans --only=65b --out=experiments/results/bench

Each plan is one `lora-jax plan`, as its command in the table says; `plans.json` has what it printed
with --json, by which commit, `plans.md` the table. What this commit has planned is not done again.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from lora_jax.io import write_json, write_text
from lora_jax.train.environment import git_commit, versions

GPT3 = "--model=gpt3-175b --batch=16"
GPT3_SLICE = f"{GPT3} --topology=v5p:4x4x8 --mesh=fsdp=16,tensor=8"
LLAMA_7B = "--model=llama-2-7b --targets=all-linear --rank=16 --batch=8 --accumulate=4"
LLAMA_65B = "--model=llama-65b --targets=all-linear --rank=16 --batch=8 --accumulate=4"
PLANS = (
    GPT3_SLICE,
    f"{GPT3_SLICE} --method=full",
    f"{GPT3_SLICE} --method=full --moments=bfloat16",
    f"{GPT3_SLICE} --method=full --offload",
    f"{GPT3} --accumulate=4 --smallest=v5p",
    f"{GPT3} --method=full --smallest=v5p",
    f"{GPT3} --method=full --moments=bfloat16 --smallest=v5p",
    *(
        f"{model}{quantize} --smallest={kind}"
        for model in (LLAMA_7B, LLAMA_65B)
        for kind in ("v5e", "v5p")
        for quantize in ("", " --quantize=nf4")
    ),
    f"{LLAMA_7B} --method=full --smallest=v5e",
    f"{LLAMA_7B} --method=full --smallest=v5p",
    "--model=llama-65b --targets=all-linear --rank=16 --quantize=nf4 --batch=1 --length=512 "
    "--topology=v5p:1x1x1",
    "--model=llama-65b --targets=all-linear --rank=64 --quantize=nf4 --batch=1 --length=512 "
    "--topology=v5p:1x1x1",
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only plans whose command contains this")
    parser.add_argument("--out", required=True, type=Path, help="folder of the record")
    options = parser.parse_args(arguments)
    path = options.out / "plans.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    here = {"versions": {**versions(), "libtpu": version("libtpu")}, "commit": git_commit()}
    wanted = [
        one
        for one in PLANS
        if options.only in one and found.get(one, {}).get("commit") != here["commit"]
    ]
    failed = 0
    for number, command in enumerate(wanted, 1):
        print(f"{number} of {len(wanted)}: lora-jax plan {command}", file=sys.stderr, flush=True)
        argv = [sys.executable, "-m", "lora_jax.cli.main", "plan", *shlex.split(command), "--json"]
        ended = subprocess.run(argv, stdout=subprocess.PIPE, text=True, check=False)
        if not ended.stdout:  # it said why on the terminal
            failed += 1
            continue
        told = json.loads(ended.stdout)
        found[command] = {"plans": told if isinstance(told, list) else [told], **here}
        ordered = {one: found[one] for one in PLANS if one in found}
        write_json(path, ordered)
        write_text(options.out / "plans.md", table(ordered))
    if failed:
        raise SystemExit(f"{failed} of {len(wanted)} plans could not be made; see above")


def table(found: dict[str, dict]) -> str:
    """A row a command: of several slices the last, which holds it."""
    lines = [
        "| `lora-jax plan …` | slice, mesh | trained | arguments a chip | peak a chip "
        "| arguments in all |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for command, one in found.items():
        plan = one["plans"][-1]
        mesh = ",".join(f"{name}={n}" for name, n in plan["mesh"].items() if n > 1)
        where = plan["topology"] + (f", {mesh}" if mesh else "")
        if not plan["fits"]:
            cells = ["", f"does not fit {plan['limit_bytes'] / 1e9:,.1f} GB", ""]
        else:
            in_all = plan["argument_bytes"] * plan["num_devices"]
            cells = [_gb(plan["argument_bytes"]), _gb(plan["peak_bytes"]), _gb(in_all)]
            if plan["host_bytes"]:
                cells[0] += f" + {_gb(plan['host_bytes'])} of the host's"
        lines.append(f"| `{command}` | {where} | {plan['num_trainable']:,} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _gb(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count < 1e11 else f"{count / 1e9:,.0f} GB"


if __name__ == "__main__":
    main()
