"""Rank, place or head: what separates LoRA from full fine-tuning?

The hypotheses, their margins and the rules: `experiments/configs/what_rank_2.py`.
"""

from __future__ import annotations

import dataclasses

from experiments.analysis import evidence, forgotten, pages
from experiments.analysis.evidence import Claim, power_of
from experiments.analysis.findings import COLOURS
from experiments.analysis.study import Study, read_study

MARGIN = 0.02
SEEDS, EXAMPLES = 10, 16000
# The first edition's spread of paired differences: between ranks, and between full and r = 64
# with a free head (three seeds).
OF_RANKS = {"seed_sd": 0.006, "example_sd": 0.19}
OF_FULL = {"seed_sd": 0.019, "example_sd": 0.35}
COMMON = (
    "probe",
    "qv-r1-a2",
    "qv-r1",
    "qv-r8",
    "qv-r64",
    "qv-r64-a128",
    "mlp-r4",
    "qv-full",
    "full",
)
HEADS = ("tied", "common", "tuned")
MATCHED = ("matched-mlp-r4", "matched-qv-r64", "matched-qv-full", "matched-full")


def _claim(name, text, kind, margin, pilot, expected) -> Claim:
    power = power_of(kind, margin, expected, seeds=SEEDS, examples=EXAMPLES, **pilot)
    return Claim(name, text, kind, margin, power=power, expected=expected)


def _equal(name, text, pilot) -> Claim:
    return _claim(name, text, "equivalent", MARGIN, pilot, 0.0)


# (claim, first arm, second arm): of the first's test loss minus the second's. The expected
# differences of `above` are the first edition's estimates.
COMPARED = (
    (_claim("gap_tied", "tied head: full is worse than q,v r = 64", "above", MARGIN, OF_FULL,
            0.069), "tied-full", "tied-qv-r64"),
    (_equal("gap_common", "common head: q,v r = 64 equals full", OF_FULL), "qv-r64", "full"),
    (_equal("gap_tuned", "tuned heads: q,v r = 64 equals full", OF_FULL),
     "tuned-qv-r64", "tuned-full"),
    (_claim("rank_alpha16", "alpha 16: q,v r = 1 is worse than r = 8", "above", MARGIN, OF_RANKS,
            0.043), "qv-r1", "qv-r8"),
    (_equal("rank_alpha2r", "alpha 2 r: q,v r = 1 equals r = 8", OF_RANKS), "qv-r1-a2", "qv-r8"),
    (_equal("rank_high", "alpha 16: q,v r = 64 equals r = 8", OF_RANKS), "qv-r64", "qv-r8"),
    (_equal("convention_r1", "r = 1: alpha 16 equals alpha 2 r", OF_RANKS), "qv-r1", "qv-r1-a2"),
    (_equal("convention_r64", "r = 64: alpha 16 equals alpha 2 r", OF_RANKS),
     "qv-r64", "qv-r64-a128"),
    (_claim("place", "q,v r = 64 is worse than the MLP r = 4", "above", 0.01, OF_RANKS, 0.019),
     "qv-r64", "mlp-r4"),
    (_equal("rank_of_qv", "q and v at full rank equal q,v r = 64", OF_RANKS), "qv-full", "qv-r64"),
    (_claim("place_of_full", "q and v at full rank are worse than full", "above", MARGIN, OF_FULL,
            0.05), "qv-full", "full"),
)  # fmt: skip
GAP_IS_THE_HEADS = Claim(
    "gap_is_the_heads", "from tied to tuned heads full gains on q,v r = 64", "above", 0.04
)
FORGETS = (
    (Claim("forgets_place", "full forgets more than q and v at full rank", "above", 5.0, "points"),
     "full", "qv-full"),
    (Claim("forgets_rank", "q and v at full rank forget as q,v r = 64 does", "equivalent", 2.0,
           "points"), "qv-full", "qv-r64"),
    (Claim("forgets_matched", "at matched loss full forgets more than q,v r = 64", "above", 1.0,
           "points"), "matched-full", "matched-qv-r64"),
)  # fmt: skip
COMMANDS = (
    *(
        f"lora-jax sweep --config=what_rank_2 --sweep={name} --workdir=runs/what_rank_2/{name}"
        for name in ("tuned", "common", "tied")
    ),
    "python -m experiments.analysis.forgotten runs/what_rank_2",
    "python -m experiments.analysis what_rank_2 runs/what_rank_2",
)


def page(out) -> None:
    """Verdicts, tables and figures from the study's record in `out`."""
    study = _with_shared_arms(read_study(out))
    verdicts = [
        pages.compare(claim, study[first], study[second])
        for claim, first, second in COMPARED
        if {first, second} <= study.arms.keys()
    ]
    four = [f"{head}-{arm}" for head in ("tuned", "tied") for arm in ("full", "qv-r64")]
    if set(four) <= study.arms.keys():
        tuned_full, tuned_lora, tied_full, tied_lora = (study[name] for name in four)
        gain = pages.change_of_difference((tied_full, tied_lora), (tuned_full, tuned_lora))
        arms = (tuned_full, tuned_lora, tied_full, tied_lora)
        spoilt = pages.spoilt_by(*arms)
        verdicts.insert(3, evidence.decide(GAP_IS_THE_HEADS, gain, spoilt=spoilt))
    lost = forgotten.read(out)
    verdicts += [
        forgotten.compare(claim, lost[first], lost[second])
        for claim, first, second in FORGETS
        if lost is not None and {first, second} <= lost.keys()
    ]
    claims = [claim for claim, *_ in (*COMPARED, *FORGETS)] + [GAP_IS_THE_HEADS]
    pages.write_page(
        out, name="what_rank_2", title="Rank, place or head", commands=COMMANDS, study=study,
        verdicts=verdicts, parts=[pages.waiting(claims, verdicts), *_parts(study, out, lost)],
    )  # fmt: skip


def _with_shared_arms(study: Study) -> Study:
    """The same, with the arm that `tuned` and `common` share under both names."""
    if "tuned-qv-r1" not in study.arms or "qv-r1" in study.arms:
        return study
    shared = dataclasses.replace(study["tuned-qv-r1"], name="qv-r1")
    return dataclasses.replace(study, arms={**study.arms, "qv-r1": shared})


def _parts(study: Study, out, lost) -> list[str]:
    common = [study.arms[name] for name in COMMON if name in study.arms]
    others = [arm for name, arm in study.arms.items() if name not in COMMON]
    parts = []
    if {"tuned-full", "tied-full"} <= study.arms.keys():
        text = "The same comparison at three rates of the head: tied, common to all arms, tuned"
        parts += ["## The head", pages.save_figure(_draw_heads(study), out, "heads", text)]
    if "full" in study.arms:
        parts += ["## Rank and place, one rate of the head"]
        figure = pages.draw_arms(common, reference=study["full"])
        parts += [
            pages.save_figure(_draw_ranks(study), out, "ranks", "Test loss above full's, by rank"),
            pages.save_figure(figure, out, "arms", "Test loss of each arm, and less that of full"),
        ]
    if lost is not None:
        parts += ["## Forgetting", forgotten.table(study, lost)]
        figure = forgotten.draw(study, lost)
        text = "Points of 20 Newsgroups' probe lost, against the gloss task's test loss"
        parts += [pages.save_figure(figure, out, "forgetting", text)]
    parts += ["## All arms", pages.arm_table([*common, *others])]
    return parts


def _draw_heads(study: Study):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = {"full": "full", "qv-r64": "q,v r = 64", "qv-r1": "q,v r = 1"}
    of = {"tied": "tied-{}", "common": "{}", "tuned": "tuned-{}"}
    for (name, label), colour in zip(names.items(), COLOURS, strict=False):
        arms = [study.arms.get(of[head].format(name)) for head in HEADS]
        found = [(n, arm) for n, arm in enumerate(arms) if arm is not None]
        losses = [evidence.crossed(arm.losses) for _, arm in found]
        pages.draw_errors(left, [n for n, _ in found], losses, colour, label)
        if name != "full":
            pairs = [(n, arm, study.arms.get(of[HEADS[n]].format("full"))) for n, arm in found]
            pairs = [(n, arm, full) for n, arm, full in pairs if full is not None]
            gaps = [pages.difference(full, arm) for _, arm, full in pairs]
            pages.draw_errors(right, [n for n, *_ in pairs], gaps, colour, f"full − {label}")
    right.axhline(0, color="#888888", linewidth=1)
    right.axhspan(-MARGIN, MARGIN, color="#888888", alpha=0.12, linewidth=0)
    left.set_ylabel("test loss (nats), 95%")
    right.set_ylabel("difference (nats), paired, 95%; band: ±0.02")
    for axes in (left, right):
        axes.set_xticks(range(len(HEADS)), HEADS)
        axes.set_xlabel("rate of the head")
        axes.grid(axis="y", alpha=0.3)
        axes.legend()
    return figure


def _draw_ranks(study: Study):
    """Test loss less that of full, by rank at two conventions; q and v at full rank and the MLP."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes, full = figure.subplots(), study["full"]
    axes.axhline(0, color="#888888", linewidth=1, label="full fine-tuning, 22.6 M parameters")
    lines = {"qv-full": "q and v at full rank", "mlp-r4": "MLP at r = 4"}
    for (name, label), colour in zip(lines.items(), COLOURS[2:], strict=False):
        if name in study.arms:
            above = pages.difference(study[name], full).interval()
            label = f"{label}, {study[name].parameters / 1e6:.2g} M"
            axes.axhline(above.estimate, color=colour, label=label)
            axes.axhspan(above.low, above.high, color=colour, alpha=0.12, linewidth=0)
    for label, names, colour, aside in (
        ("q,v at alpha = 16", ("qv-r1", "qv-r8", "qv-r64"), COLOURS[0], 0.97),
        ("q,v at alpha = 2 r", ("qv-r1-a2", "qv-r8", "qv-r64-a128"), COLOURS[1], 1.03),
    ):
        arms = [study[name] for name in names if name in study.arms]
        ranks = [aside * arm.cells[0]["rank"] for arm in arms]
        pages.draw_errors(axes, ranks, [pages.difference(a, full) for a in arms], colour, label)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 8, 64], ["1 (9 k)", "8 (74 k)", "64 (590 k)"])
    axes.set_xlabel("rank (adapter parameters)")
    axes.set_ylabel("test loss above full's (nats), paired, 95%")
    axes.legend(fontsize=8)
    return figure
