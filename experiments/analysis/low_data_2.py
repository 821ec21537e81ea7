"""Is LoRA better than full fine-tuning where examples are few?

The hypotheses and their margins: `experiments/configs/low_data_2.py`.
"""

from __future__ import annotations

from experiments.analysis import evidence, pages
from experiments.analysis.evidence import Claim, power_of
from experiments.analysis.study import read_study

MARGIN = 0.02
# The first edition's spread of full - LoRA, that over seeds taken larger for the draws.
PILOT = {"seed_sd": 0.02, "seeds": 10, "example_sd": 0.33, "examples": 2256}


def _claim(name: str, text: str, kind: str, expected: float) -> Claim:
    power = power_of(kind, MARGIN, expected, **PILOT)
    return Claim(name, text, kind, MARGIN, power=power, expected=expected)


# (claim, first arm, second arm): of the first's test loss minus the second's.
COMPARED = (
    (_claim("few", "at 64 full is worse than q,v r = 8", "above", 0.05), "full-n64", "qv-r8-n64"),
    (_claim("many", "at 1,024 q,v r = 8 equals full", "equivalent", 0.0),
     "qv-r8-n1024", "full-n1024"),
    (_claim("probe", "at 64 the probe is not worse than q,v r = 8", "not_above", 0.0),
     "probe-n64", "qv-r8-n64"),
)  # fmt: skip
BY_SIZE = Claim(
    "gap_by_size", "full's disadvantage to q,v r = 8 is larger at 64 than at 1,024", "above", MARGIN
)


def page(out) -> None:
    """Verdicts, table and figure from the study's record in `out`."""
    study = read_study(out)
    verdicts = [pages.compare(claim, study[one], study[other]) for claim, one, other in COMPARED]
    arms = [study[name] for name in ("full-n64", "qv-r8-n64", "full-n1024", "qv-r8-n1024")]
    gain = pages.change_of_difference((arms[0], arms[1]), (arms[2], arms[3]))
    verdicts.append(evidence.decide(BY_SIZE, gain, spoilt=pages.spoilt_by(*arms)))
    every = list(study.arms.values())
    text = "Test loss by number of training reviews, a draw per seed"
    pages.write_page(
        out, name="low_data_2", title="Few examples", study=study, verdicts=verdicts,
        commands=[
            "lora-jax sweep --config=low_data_2 --sweep=full_size --workdir=runs/low_data_2",
            "python -m experiments.analysis low_data_2 runs/low_data_2",
        ],
        parts=[pages.save_figure(pages.draw_arms(every), out, "arms", text),
               pages.arm_table(every)],
    )  # fmt: skip
