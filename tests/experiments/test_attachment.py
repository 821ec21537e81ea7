"""The table of attachment: our column is made again; the pages say what the record holds."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from experiments.peers import ours
from experiments.peers.cases import CASES
from experiments.peers.judge import VERDICTS
from experiments.peers.table import markdown
from experiments.peers.worker import best_of, outcomes_of

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "experiments" / "results" / "attachment"
RECORD = json.loads((RESULTS / "attachment.json").read_text(encoding="utf-8"))
# One of each group; the others are made again among the slow tests.
FEW = ("fused_slice", "tied_embedding", "ragged_experts")


@pytest.mark.filterwarnings("ignore::lora_jax.MaterialisedWarning")
@pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_our_cell_comes_out_as_recorded(name, float64):
    outcome = best_of(outcomes_of(ours, CASES[name]))
    assert outcome.verdict in ("low-rank", "materialised"), outcome
    assert outcome.verdict == RECORD["columns"][0]["cells"][name]["verdict"]


def test_the_page_is_made_from_the_record():
    assert set(RECORD["columns"][0]["cells"]) == set(CASES)
    page = (RESULTS / "attachment.md").read_text(encoding="utf-8")
    assert page == markdown(RECORD, CASES.values())


def test_the_readmes_counts_are_the_records():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"\| Where do adapters attach\? \|(.*)\|", readme)
    ours, qwix, nnx, quax = (
        Counter(cell["verdict"] for cell in column["cells"].values())
        for column in RECORD["columns"]
    )
    low, formed, wrong = VERDICTS[0], VERDICTS[1], VERDICTS[3]
    said = [
        sum(ours.values()),
        ours[low],
        ours[formed],
        qwix[low],
        qwix[wrong],
        nnx[low],
        quax[low],
    ]
    assert [int(n) for n in re.findall(r"\d+", row)] == said and not ours[wrong]
