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
    table = readme.split("no way to say it |\n")[1].split("\n\n")[0].splitlines()[1:]
    for line, column in zip(table, RECORD["columns"], strict=True):
        counts = Counter(cell["verdict"] for cell in column["cells"].values())
        assert [int(n) for n in re.findall(r"\| (\d+) ", line)] == [counts[v] for v in VERDICTS]
