"""Does LoRA lose more than full fine-tuning when batches are large?

The hypotheses and their margins: `experiments/configs/batch_size_2.py`.
"""

from __future__ import annotations

from experiments.analysis import evidence, pages
from experiments.analysis.evidence import Claim, power_of
from experiments.analysis.findings import COLOURS
from experiments.analysis.study import Study, read_study

MARGIN = 0.02
PILOT = {"seed_sd": 0.02, "seeds": 8, "example_sd": 0.4, "examples": 8000}
METHODS = {"probe": "#888888", "qv-r8": COLOURS[1], "all-r32": COLOURS[2], "full": COLOURS[0]}
EXPECTED = 0.06
POWER = power_of("above", MARGIN, EXPECTED, **PILOT)


def _claim(name: str, text: str) -> Claim:
    return Claim(name, text, "above", MARGIN, power=POWER, expected=EXPECTED)


# (claim, LoRA's method, arms of the larger and the smaller batch)
GAPS = (
    (_claim("gap_epoch", "one epoch: the gap of q,v r = 8 to full grows from batch 8 to 128"),
     "qv-r8", "e128", "e8"),
    (_claim("gap_steps", "100 steps: it grows from batch 8 to 128"), "qv-r8", "s128", "s8"),
    (_claim("gap_all", "one epoch: the gap of all linear layers at r = 32 grows"),
     "all-r32", "e128", "e8"),
)  # fmt: skip
COMPARED = (
    (_claim("ahead_128", "batch 128, one epoch: q,v r = 8 is worse than full"),
     "qv-r8-e128", "full-e128"),
    (_claim("beyond_probe", "there the probe is worse than q,v r = 8"), "probe-e128", "qv-r8-e128"),
)  # fmt: skip


def page(out) -> None:
    """Verdicts, table and figure from the study's record in `out`."""
    study = read_study(out)
    verdicts = []
    for claim, name, large, small in GAPS:
        arms = [study[f"{one}-{end}"] for end in (large, small) for one in (name, "full")]
        change = pages.change_of_difference((arms[0], arms[1]), (arms[2], arms[3]))
        verdicts.append(evidence.decide(claim, change, spoilt=pages.spoilt_by(*arms)))
    verdicts += [pages.compare(claim, study[one], study[other]) for claim, one, other in COMPARED]
    text = "Gap to full fine-tuning by batch size: one epoch, and the same number of steps"
    pages.write_page(
        out, name="batch_size_2", title="Large batches", study=study, verdicts=verdicts,
        commands=[
            "lora-jax sweep --config=batch_size_2 --sweep=full_size --workdir=runs/batch_size_2",
            "python -m experiments.analysis batch_size_2 runs/batch_size_2",
        ],
        parts=[pages.save_figure(_draw(study), out, "batches", text),
               pages.arm_table(list(study.arms.values()))],
    )  # fmt: skip


def _draw(study: Study):
    """Test loss of each method less full's, by batch size, a panel per design."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    designs = (
        ("one epoch of 3,200 glosses", {8: "e8", 32: "e32", 128: "e128"}),
        ("100 steps", {8: "s8", 32: "e32", 128: "s128"}),
    )
    for axes, (title, ends) in zip(panels, designs, strict=True):
        for method, colour in METHODS.items():
            sizes = [size for size, end in ends.items() if f"{method}-{end}" in study.arms]
            if method == "full" or len(sizes) < len(ends):
                continue
            found = [
                pages.difference(study[f"{method}-{ends[n]}"], study[f"full-{ends[n]}"])
                for n in sizes
            ]
            pages.draw_errors(axes, sizes, found, colour, f"{method} − full")
        axes.axhline(0, color=METHODS["full"], linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(ends), [str(n) for n in ends])
        axes.set_xlabel("batch size")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("difference (nats), paired, 95%")
    panels[0].legend(fontsize=8)
    return figure
