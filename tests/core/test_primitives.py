"""The table of primitives in `lora_jax/core/README.md` is as the rules and the constructs are."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import pytest

import lora_jax as lj
from lora_jax.core import lift as interpreter
from lora_jax.core import tags
from tests.core.adapted import setting
from tests.core.constructs import ALL

README = Path(lj.__file__).parent / "core" / "README.md"


@dataclasses.dataclass(frozen=True)
class Row:
    primitives: tuple[str, ...]
    low_rank: bool
    constructs: tuple[str, ...]


def rows():
    lines = README.read_text(encoding="utf-8").split("| primitive, met by a kernel |")[1]
    found = []
    for line in lines.split("\n\n")[0].splitlines()[2:]:
        primitives, verdict, _, constructs = line.strip("| ").split(" | ")
        word = re.match(r"low-rank|materialised", verdict)
        assert word, verdict
        found.append(
            Row(
                tuple(re.findall(r"`(\w+)`", primitives)),
                word[0] == "low-rank",
                tuple(constructs.split(", ")),
            )
        )
    return found


ROWS = rows()


def test_every_rule_has_a_row_and_every_low_rank_row_its_rules():
    named = {primitive for row in ROWS if row.low_rank for primitive in row.primitives}
    assert named == set(interpreter.RULES)


# What `kernel_axes` needs no rule for: the result has the axes of an operand of its shape, or the
# equation holds a jaxpr that takes its operands as they are.
ELEMENTWISE = {
    "add", "complex", "convert_element_type", "copy", "copy_p", "div", "layout_constraint", "mul",
    "name", "neg", "pvary", "reshard", "rev", "sharding_constraint", "sub",
}  # fmt: skip
HOLDS_A_JAXPR = {
    "checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr", "eval_jaxpr", "jit", "pjit", "remat", "remat2",
}  # fmt: skip


def test_what_lift_keeps_low_rank_kernel_axes_follows():
    followed = {*tags.AXIS_RULES, *tags.WHOLE_RULES}
    assert set(interpreter.RULES) - followed == ELEMENTWISE | HOLDS_A_JAXPR


def test_every_construct_has_a_row_with_its_verdict():
    # That the verdict is true, `test_lift.py` shows by counting what is materialised.
    assert {name for row in ROWS for name in row.constructs} == set(ALL)
    for row in ROWS:
        wrong = [name for name in row.constructs if ALL[name].low_rank != row.low_rank]
        assert not wrong, (row, wrong)


@pytest.mark.filterwarnings("ignore::lora_jax.MaterialisedWarning")
def test_in_every_construct_of_a_row_an_adapted_kernel_meets_the_rows_primitives(monkeypatch):
    met: set[str] = set()
    rule = interpreter.Interpreter._apply_rule

    def spy(self, eqn, values):
        met.add(eqn.primitive.name)
        return rule(self, eqn, values)

    monkeypatch.setattr(interpreter.Interpreter, "_apply_rule", spy)
    of = {}
    for name in ALL:
        met.clear()
        apply, method, trainable, frozen, x = setting(name, "float32")
        lifted = lj.lift(apply)
        jax.make_jaxpr(lambda t: lifted(method.bind(t, frozen), x))(trainable)  # noqa: B023
        of[name] = set(met)
    for row in ROWS:
        missed = [name for name in row.constructs if not of[name] & set(row.primitives)]
        assert not missed, (row.primitives, missed)
