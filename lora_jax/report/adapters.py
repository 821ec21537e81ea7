"""One page about adapters on disk: what each learned, and what they have in common."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from lora_jax.analysis.adapters import NUM_SAMPLES, Pair, PairProfile
from lora_jax.analysis.angles import LEVEL
from lora_jax.analysis.profiles import INTRUDER_COSINE, NUM_INTRUDERS, MatrixProfile
from lora_jax.io.atomic import write_text
from lora_jax.report.adapter_figures import (
    draw_against_kernel,
    draw_amplification,
    draw_overview,
    draw_similarity,
    draw_spectra,
    group_by_kind,
)
from lora_jax.report.adapter_results import Analysis
from lora_jax.report.html import (
    html_figure,
    html_leads,
    html_note,
    html_page,
    html_table,
    html_warnings,
    page_path,
)
from lora_jax.report.quantities import ABSENT


def write_analysis(analysis: Analysis, out) -> Path:
    """Writes the page to `page_path(out)`; returns its path. Raises as that does."""
    out = page_path(out)
    write_text(out, analysis_page(analysis))
    return out


def analysis_page(analysis: Analysis) -> str:
    """The page as HTML; everything that came from outside is escaped."""
    names = list(analysis.profiles)
    known = {name: found for name, found in analysis.profiles.items() if _factors(found)}
    parts = [
        f"<h1>{escape(', '.join(names))}</h1>",
        *html_leads(headline(analysis)),
        html_warnings(analysis.notes),
        *_similarity_parts(names, analysis.pairs),
    ]
    parts.append('<h2 id="spectra">What each learned</h2>')
    parts.append(html_figure(draw_spectra(analysis.profiles)))
    for name, profiles in analysis.profiles.items():
        parts.append(f"<h3>{escape(name)}</h3>")
        head = (*_HEAD, *_BASE_HEAD) if name in known else _HEAD
        parts.append(html_table(name, head, [_row(profile) for profile in profiles]))
    parts.append(html_note(_NOTE))
    if known:
        of_base = f" of {analysis.base}" if analysis.base else ""
        parts.append(f'<h2 id="base">ΔW next to W{escape(of_base)}</h2>')
        parts.append(html_figure(draw_amplification(known)))
        for number, (name, profiles) in enumerate(known.items()):
            parts.append(html_figure(draw_against_kernel(name, number, profiles)))
        parts.append(html_note(_BASE_NOTE))
    parts.append(
        '<footer class="quiet">Written by lora-jax analyze. This file holds all it shows and asks '
        "nothing of the network.</footer>"
    )
    return html_page(f"{', '.join(names)} · lora-jax analysis", parts)


def _similarity_parts(names: list[str], pairs: Sequence[Pair]) -> list[str]:
    """What adapters have in common: every pair of few, a line and a cell per pair of many."""
    if not pairs:
        return []
    parts = ['<h2 id="similarity">What they have in common</h2>']
    if len(pairs) > MAX_PAIRS:
        parts.append(html_figure(draw_overview(names, pairs)))
        rows = [_overview_row(names, pair) for pair in pairs]
        return [
            *parts,
            html_table("every two adapters", _OVERVIEW_HEAD, rows),
            html_note(_MANY_NOTE),
        ]
    for number, pair in enumerate(pairs):
        parts.append(f"<h3>{escape(pair.first)} and {escape(pair.second)}</h3>")
        if pair.profiles:
            rows = [_pair_row(profile) for profile in pair.profiles]
            parts.append(html_table("similarity", _PAIR_HEAD, rows))
            parts += [html_figure(draw_similarity(pair, number, s)) for s in ("input", "output")]
    return [*parts, html_note(_PAIR_NOTE)]


def headline(analysis: Analysis) -> list[str]:
    """What was found, in a sentence for each adapter and each pair."""
    lines = []
    for name, profiles in analysis.profiles.items():
        ranks = sorted({profile.rank for profile in profiles})
        ranks_text = (
            " and ".join(map(str, ranks)) if len(ranks) < 4 else f"{ranks[0]} to {ranks[-1]}"
        )
        stable = np.median([profile.stable_rank for profile in profiles])
        line = (
            f"{name} changes {len(profiles)} "
            f"{'matrices' if len(profiles) > 1 else 'matrix'} at rank {ranks_text}; the median "
            f"stable rank of its ΔW is {stable:.1f}"
        )
        if factors := _factors(profiles):
            null = [p.amplification.random_factor for p in profiles if p.amplification is not None]
            line += (
                f", the median amplification {_shown(float(np.median(factors)), '.1f')} (a random "
                f"ΔW of the same norm: {_shown(float(np.median(null)), '.1f')})"
            )
        lines.append(f"{line}.")
    compared = [pair for pair in analysis.pairs if pair.profiles]
    if len(compared) > MAX_PAIRS:
        return [*lines, _most_alike(compared)]
    return lines + [_pair_line(pair) for pair in compared]


def _pair_line(pair: Pair) -> str:
    first = np.mean([profile.input[0, 0] for profile in pair.profiles])
    null = np.mean([profile.expected[0, 0] for profile in pair.profiles])
    return (
        f"{pair.first} and {pair.second}: the first directions of inputs have φ = "
        f"{first:.2f} on average over {len(pair.profiles)}, random ones {null:.3f}; in "
        f"{_above_random(pair)} it is more than any of {NUM_SAMPLES} random pairs reached (by "
        f"chance in about {len(pair.profiles) / (NUM_SAMPLES + 1):.0f}).{_shared_text(pair)}"
    )


def _most_alike(pairs: Sequence[Pair]) -> str:
    """A sentence on many pairs: how much they have in common, and the pair that has most."""
    means = [float(np.mean([p.input[0, 0] for p in pair.profiles])) for pair in pairs]
    low, middle, high = np.quantile(means, [0, 0.5, 1])
    most = pairs[int(np.argmax(means))]
    return (
        f"{len(pairs)} pairs: the first directions of inputs have φ = {middle:.2f} in the median "
        f"pair ({low:.2f} to {high:.2f}, means over matrices). Most alike: {_pair_line(most)}"
    )


def _shared_text(pair: Pair) -> str:
    """A sentence on shared directions of inputs, where they can be counted."""
    counts = [p.shared[0] for p in pair.profiles if p.shared[0] is not None]
    if not counts:
        return ""
    return (
        f" They share {np.mean(counts):.1f} directions of inputs on average ({min(counts)} to "
        f"{max(counts)}; random spaces share one in about {LEVEL:.0%} of matrices)."
    )


# What is shown of ΔW: the field, its form for one matrix, and for the mean over several.
_SPECTRUM = {
    "‖ΔW‖": ("delta_norm", ".3g", ".3g"),
    "stable rank": ("stable_rank", ".2f", ".2f"),
    "effective rank": ("entropy_rank", ".2f", ".2f"),
    "90% of energy": ("energy_rank", "d", ".1f"),
    "99% of energy": ("energy_rank_99", "d", ".1f"),
}
_HEAD = ("matrix", "inputs × outputs", "rank", *_SPECTRUM)
_BASE_HEAD = (
    *("‖ΔW‖ / ‖W‖", "amplification", "of a random ΔW", "‖UᵀWV‖, ΔW's", "W's own", "random"),
    f"intruders of {NUM_INTRUDERS}",
)
_PAIR_HEAD = (
    *("matrix", "ranks", "φ(1, 1) inputs", "φ(r, r) inputs", "random, expected", "shared, cos²"),
    *("φ(1, 1) outputs", "φ(r, r) outputs", "random, expected", "shared, cos²"),
)
_NOTE = (
    "Of ΔW, by its singular values s: stable rank Σs² / s₁², effective rank exp(H(s / Σs)) (Roy & "
    "Vetterli 2007), and the fewest directions that hold 90% and 99% of Σs²."
)
_BASE_NOTE = (
    "Amplification is ‖ΔW‖ over ‖UᵀWV‖ with ΔW's own r directions of inputs and outputs; after it "
    "that of random directions with the same ‖ΔW‖, where ‖UᵀWV‖ is ‖W‖ r / √(inputs · outputs), "
    "and ‖UᵀWV‖ with W's first r and with random ones (Hu et al. 2021, Table 7). Intruders: of the "
    f"first {NUM_INTRUDERS} directions of outputs of W + ΔW those like none of W's, every "
    f"|cosine| below {INTRUDER_COSINE} (Shuttleworth et al. 2024)."
)
_PAIR_NOTE = (
    "φ(r, r) is of all directions shown of both (the smaller number, where ranks differ); what "
    "random spaces of as many have in common is in the column after. φ is of ΔW's singular "
    "directions, which no other way of writing the same ΔW as a product changes. Shared: how many "
    "directions both have in common, by their principal angles, and the cos² that one must exceed: "
    f"the {1 - LEVEL:.0%} quantile of the largest of random spaces."
)


# Pairs that are shown matrix by matrix, with figures: all of four adapters.
MAX_PAIRS = 6
_OVERVIEW_HEAD = (
    *("numbers", "adapters", "matrices", "φ(1, 1) of inputs", "of random", "above all random, of"),
    *("φ(1, 1) of outputs", "shared directions of inputs", "of outputs"),
)
_MANY_NOTE = (
    "Means over the matrices that both adapters change. Name two adapters alone to see each of "
    "these matrices, or take --json, which has those of all pairs."
)


def _overview_row(names: list[str], pair: Pair) -> tuple[str, ...]:
    numbers = f"{names.index(pair.first) + 1}, {names.index(pair.second) + 1}"
    found = [numbers, f"{pair.first} and {pair.second}", str(len(pair.profiles))]
    if not pair.profiles:
        return (*found, *[ABSENT] * (len(_OVERVIEW_HEAD) - 3))
    means = []
    for side in (0, 1):
        counts = [count for p in pair.profiles if (count := p.shared[side]) is not None]
        means.append(f"{np.mean(counts):.2f}" if counts else ABSENT)
    return (
        *found,
        f"{np.mean([p.input[0, 0] for p in pair.profiles]):.3f}",
        f"{np.mean([p.expected[0, 0] for p in pair.profiles]):.4f}",
        str(_above_random(pair)),
        f"{np.mean([p.output[0, 0] for p in pair.profiles]):.3f}",
        *means,
    )


def _above_random(pair: Pair) -> int:
    """In how many matrices the first directions have more in common than any random pair."""
    return sum(bool(p.input[0, 0] > p.highest[0, 0]) for p in pair.profiles)


def _row(profile: MatrixProfile) -> tuple[str, ...]:
    found = (
        profile.module,
        f"{profile.shape[0]} × {profile.shape[1]}",
        str(profile.rank),
        *(f"{getattr(profile, name):{form}}" for name, form, _ in _SPECTRUM.values()),
    )
    one = profile.amplification
    if one is None:
        return found
    return (
        *found,
        _shown(float(one.delta_norm / one.kernel_norm) if one.kernel_norm else math.nan),
        _shown(float(one.factor)),
        _shown(float(one.random_factor)),
        f"{one.from_delta:.3g}",
        f"{one.from_kernel:.3g}",
        f"{one.from_random:.3g}",
        str(profile.intruders),
    )


def _pair_row(profile: PairProfile) -> tuple[str, ...]:
    last = min(profile.ranks) - 1
    found = [profile.module, " and ".join(map(str, profile.ranks))]
    spaces = ((profile.input, profile.expected), (profile.output, profile.expected_output))
    for (grid, null), count, above in zip(
        spaces, profile.shared, profile.shared_above, strict=True
    ):
        found += [f"{grid[0, 0]:.3f}", f"{grid[last, last]:.3f}"]
        found.append(f"{null[0, 0]:.3f}, {null[last, last]:.3f}")
        found.append(ABSENT if count is None else f"{count}, above {above:.2f}")
    return tuple(found)


def _factors(profiles: Sequence[MatrixProfile]) -> list[float]:
    """How much ΔW amplifies in each matrix, where the base is known."""
    return [float(p.amplification.factor) for p in profiles if p.amplification is not None]


def summary_table(profiles: Sequence[MatrixProfile]) -> list[tuple[str, ...]]:
    """Texts for a terminal: the head, then the means of each kind of matrix over its layers."""
    by_name = {profile.module: profile for profile in profiles}
    kinds = group_by_kind(by_name)
    start = os.path.commonprefix(list(kinds)).rpartition(".")[0] if len(kinds) > 1 else ""
    head: tuple[str, ...] = ("matrix", "layers", *_SPECTRUM)
    if _factors(profiles):
        head += ("amplification", "over random", "intruders")
    lines: list[tuple[str, ...]] = [head]
    for kind, modules in kinds.items():
        some = [by_name[module] for module in modules]
        line = [kind.removeprefix(f"{start}."), str(len(some))]
        for name, _, form in _SPECTRUM.values():
            line.append(f"{np.mean([getattr(p, name) for p in some]):{form}}")
        if factors := _factors(some):
            line.append(_shown(float(np.mean(factors))))
            over = [p.amplification.over_random for p in some if p.amplification is not None]
            line.append(_shown(float(np.mean(over))))
            line.append(f"{np.mean([p.intruders or 0 for p in some]):.1f}")
        lines.append(tuple(line))
    return lines


def _shown(value: float, form: str = ".3g") -> str:
    return f"{value:{form}}" if math.isfinite(value) else ABSENT
