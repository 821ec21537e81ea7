"""`lora-jax plan`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import lora_jax as lj
from lora_jax.cli.parser import Parser, say, tell

EXAMPLES = """\
Examples:
  LoRA on GPT-3 on 128 chips, and full fine-tuning at the same batch:
    lora-jax plan --model=gpt3-175b --method=lora --rank=4 --targets=q,v --topology=v5p:4x4x8 \\
        --mesh=fsdp=16,tensor=8 --batch=16 --compare=full
  A base of 65 billion parameters in four bits on one chip:
    lora-jax plan --model=llama-65b --method=lora --targets=all-linear --rank=64 --quantize=nf4 \\
        --topology=v5p:1x1x1 --batch=1 --length=512
  The smallest slice:
    lora-jax plan --model=llama-2-7b --method=full --batch=8 --smallest=v5e

What is compiled is the step that `train` runs: bfloat16 base, float32 adapters and moments, layers
computed again in the backward pass. A plan takes two to four minutes and no TPU, only XLA's
compiler for them (pip install 'jax[tpu]'). Bytes are per device, GB are 10^9. The time is the
roofline's: FLOPs at the chip's peak, or every argument read once, whichever takes longer; no
communication, no attention kernels, so a lower bound.
"""


def run(argv: Sequence[str]) -> int:
    parser = Parser("plan", epilog=EXAMPLES)
    parser.add_argument("--model", required=True, help="by its shapes: gpt3-175b, llama-2-7b, …")
    parser.add_argument("--method", default="lora", help="lora, full, dora, … (default: lora)")
    parser.add_argument("--targets", default="q,v", help="(default: q,v)")
    parser.add_argument("--rank", type=int, default=4, help="(default: 4)")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--topology", metavar="KIND:LAYOUT", help="in chips: v5p:4x4x8, v5e:2x4")
    where.add_argument("--smallest", metavar="KIND", help="the smallest slice that holds it")
    parser.add_argument("--mesh", default="", help="fsdp=16,tensor=8 (default: fsdp over all)")
    parser.add_argument("--batch", type=int, required=True, help="sequences, over the whole slice")
    parser.add_argument("--length", type=int, default=2048, help="tokens each (default: 2048)")
    parser.add_argument(
        "--quantize", default="", metavar="nf4", help="a base in four bits, but where all trains"
    )
    parser.add_argument("--dtype", default="bfloat16", help="of the base (default: bfloat16)")
    parser.add_argument("--moments", default="float32", help="Adam's (default: float32)")
    parser.add_argument(
        "--remat", default="nothing_saveable", help="a policy (default: nothing_saveable)"
    )
    parser.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="parts of a batch (default: 1)"
    )
    parser.add_argument("--offload", action="store_true", help="Adam's moments in hosts' memory")
    parser.add_argument("--compare", metavar="METHOD", help="plan this method, too: full")
    options = parser.parse_args(argv)
    import jax

    flags: Any = jax.config  # its attributes are made at run time
    if not flags.jax_platforms:
        # Nothing runs on a device: none is waited for, and none complains that it is not there.
        jax.config.update("jax_platforms", "cpu")
    from lora_jax.plan.plan import find_smallest, make_plan

    request = _request(options)
    plans: list[Any] = []
    try:
        for method in filter(None, (options.method, options.compare)):
            own = dataclasses.replace(request, method=method)
            if method == "full":  # what trains whole is not in four bits
                own = dataclasses.replace(own, quantize="")
            if options.smallest:
                plans += find_smallest(own, options.smallest, tell)
            else:
                plans.append(make_plan(own, tell))
    except lj.RequestError:
        if plans and not options.json:  # what took minutes is not thrown away
            say(table(plans))
        raise
    found = [plan.to_json() for plan in plans]
    say(json.dumps(found[0] if len(found) == 1 else found) if options.json else table(plans))
    return 0 if plans[-1].fits else 1


def _request(options: Any):
    from lora_jax.parallel.mesh import read_mesh
    from lora_jax.plan.plan import Request
    from lora_jax.plan.topology import chips_of
    from lora_jax.settings import check

    for name in ("batch", "length", "rank", "accumulate"):
        if getattr(options, name) < 1:
            raise lj.RequestError(f"--{name}={getattr(options, name)} must be at least 1")
    check("train.remat", options.remat)
    sizes = read_mesh(options.mesh)
    if not options.mesh and options.topology:
        sizes["fsdp"] = chips_of(options.topology)
    fields = (field.name for field in dataclasses.fields(Request))
    given: dict[str, Any] = {name: getattr(options, name, None) for name in fields}
    of_method = {"targets": options.targets, "rank": options.rank, "alpha": 2.0 * options.rank}
    own = {"topology": options.topology or "", "mesh": sizes, "settings": of_method}
    return Request(**(given | own))


def table(plans: Sequence[Any]) -> str:
    """The plans as text: what they are of, then one line per plan."""
    first = plans[0].request
    head = (
        f"{first.model}: {plans[0].num_params / 1e9:,.2f} billion parameters, batch {first.batch} "
        f"x {first.length} tokens, {first.dtype}"
        f"{', kernels in ' + first.quantize if first.quantize else ''}, moments {first.moments}"
        f"{' in the memory of hosts' if first.offload else ''}, "
        f"remat {first.remat or 'none'}"
        f"{f', in {first.accumulate} parts' if first.accumulate > 1 else ''}"
    )
    rows: list[tuple[str, ...]] = [
        ("method", "slice", "mesh", "trainable", "arguments", "temporaries", "peak", "limit",
         "whole slice", "step at least"),
    ]  # fmt: skip
    for plan in plans:
        mesh = ",".join(f"{name}={n}" for name, n in plan.request.mesh.items() if n > 1)
        kept = (plan.argument_bytes, plan.temp_bytes, plan.peak_bytes)
        if plan.fits:
            sizes = [_gb(size) for size in kept]
        else:
            sizes = ["", "", f"{_gb(plan.needed_bytes)}: no" if plan.needed_bytes else "no"]
        rows.append(
            (
                plan.request.method,
                plan.request.topology,
                mesh or "one",
                f"{plan.num_trainable:,}",
                *sizes,
                _gb(plan.limit_bytes),
                _gb(plan.total_argument_bytes) if plan.fits else "",
                f"{plan.seconds_at_least:.3g} s",
            )
        )
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    offloaded = [
        f"{plan.request.method}: {_gb(plan.host_bytes)} GB of moments a device lie in the memory "
        "of hosts, and in no column"
        for plan in plans
        if plan.host_bytes
    ]
    units = "GB a device, arguments of the whole slice in all; peak against limit decides."
    return "\n".join([head, *lines, units, *offloaded, *_ratios(plans)])


def _ratios(plans: Sequence[Any]) -> list[str]:
    fitting = {plan.request.method: plan for plan in plans if plan.fits}
    if len(fitting) < 2:
        return []
    (name, one), (other_name, other) = list(fitting.items())[:2]
    return [
        f"{other_name} / {name}: arguments of the whole slice "
        f"{other.total_argument_bytes / one.total_argument_bytes:.2f}, peak a device "
        f"{other.peak_bytes / one.peak_bytes:.2f}"
    ]


def _gb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e9:,.2f}" if count < 1e11 else f"{count / 1e9:,.0f}"
