"""Rank or place in a task without a new head: SmolLM2 on E2E.

The hypotheses and their margins: `experiments/configs/what_rank_e2e_2.py`.
"""

from __future__ import annotations

from experiments.analysis import pages
from experiments.analysis.evidence import Claim, power_of
from experiments.analysis.study import read_study

PILOT = {"seed_sd": 0.0165, "seeds": 8, "example_sd": 0.05, "examples": 64}


def _claim(name: str, text: str, kind: str, margin: float, expected: float) -> Claim:
    power = power_of(kind, margin, expected, **PILOT)
    return Claim(name, text, kind, margin, power=power, expected=expected)


# (claim, first arm, second arm): of the first's test loss minus the second's, nats per token.
COMPARED = (
    (_claim("one", "alpha 32: q,v r = 1 is worse than r = 4", "above", 0.01, 0.025), "r1", "r4"),
    (_claim("one_2", "alpha 8 r: q,v r = 1 equals r = 4", "equivalent", 0.02, 0.0), "r1-a8", "r4"),
    (_claim("place", "q,v r = 4 is worse than all linear layers", "above", 0.02, 0.05),
     "r4", "all-r4"),
    (_claim("full", "q,v r = 4 is worse than full", "above", 0.03, 0.073), "r4", "full"),
    (_claim("all_full", "all linear layers at r = 4 equal full", "equivalent", 0.03, 0.0),
     "all-r4", "full"),
)  # fmt: skip


def page(out) -> None:
    """Verdicts, table and figure from the study's record in `out`."""
    study = read_study(out)
    verdicts = [pages.compare(claim, study[one], study[other]) for claim, one, other in COMPARED]
    arms = list(study.arms.values())
    text = "Test loss of each arm, and less that of full"
    figure = pages.draw_arms(arms, reference=study["full"])
    pages.write_page(
        out, name="what_rank_e2e_2", title="Rank or place without a new head", study=study,
        verdicts=verdicts,
        commands=[
            "lora-jax sweep --config=what_rank_e2e_2 --sweep=full_size "
            "--workdir=runs/what_rank_e2e_2",
            "python -m experiments.analysis what_rank_e2e_2 runs/what_rank_e2e_2",
        ],
        parts=[pages.save_figure(figure, out, "arms", text), pages.arm_table(arms)],
    )  # fmt: skip
