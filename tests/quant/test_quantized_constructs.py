"""A quantised kernel under every construct of `lift`: merge the dequantised one, then apply."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

import lora_jax as lj
from tests.core.adapted import largest_difference, setting, value_and_gradients
from tests.core.constructs import ALL

# A mesh splits kernels, and the four bits of one stay together: materialised, which others test.
pytestmark = [
    pytest.mark.usefixtures("float64"),
    pytest.mark.filterwarnings("ignore::lora_jax.MaterialisedWarning"),
]


FEW = ("dense_general", "tied_embedding", "scanned_with_remat", "layers_by_index", "grouped_conv")
# Its stack axis is behind its inputs, which `quantize` refuses.
NOT_QUANTIZED = ("depthwise_conv_of_keras",)
NAMES = [
    n if n in FEW else pytest.param(n, marks=pytest.mark.slow)
    for n in ALL
    if n not in NOT_QUANTIZED
]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_equal_those_over_the_dequantised_base(name):
    apply, method, trainable, frozen, x = setting(name, "float64")
    kernels = {path: leaf for path, leaf in frozen.items() if leaf.ndim > 1}
    assert kernels
    quantized = lj.quantize(frozen, r".*", axes=method.axes)
    assert all(isinstance(quantized[path], lj.quant.NF4Weight) for path in kernels)
    plain = lj.quant.dequantize(quantized)
    assert all(jnp.any(plain[path] != kernels[path]) for path in kernels)

    def lifted(trainable, x):
        return lj.lift(apply)(method.bind(trainable, quantized), x)

    def merged(trainable, x):
        return apply(method.merge(trainable, plain), x)

    forward_only = name == "while_loop"
    with lj.watch_materialised() as events:
        found = value_and_gradients(lifted, trainable, x, forward_only=forward_only)
    expanded = name in MATERIALISED or not ALL[name].low_rank
    assert bool(events) == expanded, [str(event) for event in events]
    expected = value_and_gradients(merged, trainable, x, forward_only=forward_only)
    assert largest_difference(found, expected) < 1e-9


# Shards and chunks see a part of the array itself; four bits times a number, moved or padded are no
# four bits, and two kernels in four bits are not one.
MATERIALISED = (
    "shard_map_around",
    "shard_map_over_inputs",
    "shard_map_around_a_scan",
    "scaled_kernel",
    "moved_kernel",
    "padded_kernel",
    "kernels_fused_inside",
    "kernels_stacked_inside",
    "kernels_over_the_inputs",
    "kernels_beside_a_plain_one",
    "layers_stacked_inside",
    "kernels_added",
    "complex_kernel",
    "scan_over_chunks_of_inputs",
    "scan_over_chunks_of_outputs",
    "scan_over_chunks_in_scanned_layers",
)
