"""What `lora-jax analyze` found, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from lora_jax.analysis.adapters import Pair, PairProfile
from lora_jax.analysis.profiles import MatrixProfile


@dataclasses.dataclass(frozen=True)
class Analysis:
    """What `lora-jax analyze` found. `profiles` is `{adapter: its matrices}`; `notes` are sentences
    that a reader must not miss (another base, no common matrix, DoRA's scaling left out).
    """

    profiles: dict[str, list[MatrixProfile]]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]
    base: str = ""


def analysis_json(analysis: Analysis) -> dict[str, Any]:
    """All numbers of the page, grids in full, as JSON values."""
    return {
        "base": analysis.base or None,
        "notes": list(analysis.notes),
        "adapters": {
            name: [_matrix_json(profile) for profile in profiles]
            for name, profiles in analysis.profiles.items()
        },
        "pairs": [
            {
                "first": pair.first,
                "second": pair.second,
                "only_one_changes": list(pair.alone),
                "other_shapes": list(pair.unlike),
                "matrices": [_matrix_json(profile) for profile in pair.profiles],
            }
            for pair in analysis.pairs
        ],
    }


# Names in JSON of what a profile's fields call otherwise.
_JSON_NAMES = {
    "module": "matrix",
    "s": "singular_values",
    "expected": "input_expected",
    "expected_output": "output_expected",
    "highest": "random_highest",
}


def _matrix_json(profile: MatrixProfile | PairProfile) -> dict[str, Any]:
    """The fields that are known; what needs the base is left out without one."""
    fields: dict[str, Any] = {
        _JSON_NAMES.get(f.name, f.name): getattr(profile, f.name)
        for f in dataclasses.fields(profile)
    }
    if isinstance(profile, MatrixProfile):
        fields["delta_norm"] = profile.delta_norm
        if profile.amplification is not None:
            # JSON has no infinity: where W holds nothing, nothing is what it is amplified from.
            fields["amplification"] = {
                name: value if math.isfinite(value) else None
                for name, value in profile.amplification._asdict().items()
            }
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in fields.items()
        if value is not None
    }
