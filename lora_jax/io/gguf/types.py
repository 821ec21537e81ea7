"""The number formats of GGUF tensors, as the `gguf` library knows them.

The library is slow to import, hence imported where it is used.
"""

import functools

import numpy as np


def block_of(code: int) -> tuple[str, int, int] | None:
    """Returns a format's name, the values in a block and the block's bytes; None if unknown."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(code)
        return (kind.name, *GGML_QUANT_SIZES[kind])
    except (ValueError, KeyError):
        return None


@functools.cache
def expandable_types() -> tuple[str, ...]:
    """Returns the names of the formats that `expanded` takes."""
    from gguf import GGML_QUANT_SIZES

    # Asked one by one, with a block of zeros: the library has no public list.
    names = []
    for kind, (_, block_bytes) in GGML_QUANT_SIZES.items():
        try:
            expanded(np.zeros((1, block_bytes), np.uint8), kind.name)
        except NotImplementedError:
            continue
        names.append(kind.name)
    return tuple(names)


def expanded(raw_RB: np.ndarray, name: str) -> np.ndarray:
    """Returns the rows of whole blocks `raw_RB` (uint8) of format `name` as float32 values.

    Raises `NotImplementedError` for a format that the library cannot expand.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    # A damaged scale may overflow; the check that weights are finite reports it.
    with np.errstate(all="ignore"):
        return dequantize(raw_RB, GGMLQuantizationType[name])
