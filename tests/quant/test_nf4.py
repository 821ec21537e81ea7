"""NF4 against float64 NumPy by brute force; `tests/parity` holds it to bitsandbytes' bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.quant import nf4
from lora_jax.quant.weight import encode_kernel


def normal(*shape, seed=0, scale=1.0):
    return scale * np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nearest(x, table):
    """The number of the nearest value of `table`, in float64."""
    return np.abs(np.asarray(x, np.float64)[..., None] - np.asarray(table, np.float64)).argmin(-1)


def test_the_table_is_that_of_normal_quantiles():
    # QLoRA's published construction: both halves to the same offset, 0 once, over the largest.
    from scipy.stats import norm

    offset = 0.5 * ((1 - 1 / 32) + (1 - 1 / 30))
    low = norm.ppf(np.linspace(offset, 0.5, 8)[:-1])
    high = norm.ppf(np.linspace(offset, 0.5, 9)[:-1])
    values = np.sort(np.concatenate([-low, [0], high]))
    np.testing.assert_allclose(nf4.CODEBOOK, values / values.max(), atol=2e-7)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e20, 1e-20])
def test_codes_are_of_the_nearest_value_and_scales_the_largest_of_a_block(scale):
    x = normal(5, 256, scale=scale)
    x[0, :64] = 0
    codes, scales = nf4.encode(jnp.asarray(x))
    largest = np.abs(x.reshape(5, 4, 64)).max(-1)
    np.testing.assert_array_equal(scales, largest)
    quotients = x.reshape(5, 4, 64).astype(np.float64) / np.where(largest, largest, 1)[..., None]
    expected = nearest(quotients, nf4.CODEBOOK)
    apart = np.abs(expected - np.asarray(codes).reshape(expected.shape))
    # A quotient rounded to float32 may lie on the other side of the middle of two values.
    middles = (nf4.CODEBOOK[:-1].astype(np.float64) + nf4.CODEBOOK[1:]) / 2
    at_middle = np.abs(quotients[..., None] - middles).min(-1) < 2e-7
    assert not apart[~at_middle].any() and apart.max() <= 1
    values = nf4.decode(codes, scales).reshape(5, 4, 64)
    np.testing.assert_array_equal(
        values, nf4.CODEBOOK[np.asarray(codes).reshape(5, 4, 64)] * largest[..., None]
    )


def test_packing_is_undone_and_the_first_of_two_is_the_upper_half():
    codes = np.random.default_rng(0).integers(0, 16, (3, 130)).astype(np.uint8)
    packed = nf4.pack(jnp.asarray(codes))
    np.testing.assert_array_equal(packed, codes[:, ::2] * 16 + codes[:, 1::2])
    np.testing.assert_array_equal(nf4.unpack(packed), codes)


@pytest.mark.parametrize("num", [256, 600, 7])
def test_scales_in_eight_bits_are_the_nearest_of_the_256(num):
    scales = np.abs(normal(2, num)) + 1
    codes, block_scales, mean = nf4.encode_scales(jnp.asarray(scales))
    np.testing.assert_allclose(mean, scales.mean(-1, dtype=np.float64), rtol=1e-6)
    rest = scales - np.asarray(mean)[:, None]
    for row in range(2):
        for start in range(0, num, 256):
            block = rest[row, start : start + 256].astype(np.float64)
            largest = np.abs(block).max()
            np.testing.assert_allclose(block_scales[row, start // 256], largest)
            found = nf4.SCALE_CODES[np.asarray(codes)[row, start : start + 256]] * largest
            best = nf4.SCALE_CODES[nearest(block / largest, nf4.SCALE_CODES)] * largest
            assert np.all(np.abs(found - block) <= np.abs(best - block) + 1e-6)
            np.testing.assert_allclose(
                nf4.decode_scales(codes, block_scales, mean)[row, start : start + 256],
                found + float(mean[row]),
                rtol=1e-6,
            )


def test_the_256_values_are_symmetric_but_for_zero_and_one():
    codes = nf4.SCALE_CODES
    assert codes.shape == (256,) and np.all(np.diff(codes) > 0)
    assert codes[-1] == 1 and 0 in codes
    np.testing.assert_array_equal(-codes[:127], codes[128:-1][::-1])


@pytest.mark.parametrize(
    "roles, shape",
    [
        *(("io", (128, 96)), ("sio", (3, 64, 32)), ("ioo", (64, 4, 6))),
        *(("oi", (32, 192)), ("io", (30, 50)), ("ssio", (2, 2, 70, 3))),
    ],
)
@pytest.mark.parametrize("double_quant", [False, True])
def test_a_kernel_is_flattened_outputs_first_and_comes_back_in_its_order(
    roles, shape, double_quant
):
    kernel = normal(*shape, scale=0.1)
    value = encode_kernel(jnp.asarray(kernel), roles, "w", double_quant=double_quant)
    assert (value.shape, value.dtype, value.size) == (shape, jnp.float32, kernel.size)
    found = np.asarray(value.dequantize())
    count = roles.count("s")
    order = [n for n, r in enumerate(roles) if r == "s"]
    order += [n for n, r in enumerate(roles) if r == "o"]
    order += [n for n, r in enumerate(roles) if r == "i"]
    flat = kernel.transpose(order).reshape(-1, int(np.prod(shape[count:])))
    back = found.transpose(order).reshape(flat.shape)
    for matrix, decoded in zip(flat, back, strict=True):
        padded = np.pad(matrix, (0, -len(matrix) % 64)).reshape(-1, 64)
        largest = np.abs(padded).max(-1, keepdims=True)
        expected = (nf4.CODEBOOK[nearest(padded / largest, nf4.CODEBOOK)] * largest).ravel()
        # In eight bits a scale is off by less than half a step of its block: 2% of the largest.
        room = 0.02 * largest.max() if double_quant else 1e-7
        np.testing.assert_allclose(decoded, expected[: len(matrix)], atol=room)


def test_bits_a_parameter_are_those_of_the_source():
    params = {"w": jnp.asarray(normal(1024, 512)), "bias": jnp.zeros(512)}
    for double_quant, expected in ((False, 4.5), (True, 4.127)):
        quantized = lj.quantize(params, "w", double_quant=double_quant)
        assert lj.quant.bits_per_param(quantized) == pytest.approx(expected, abs=6e-4)
        assert nf4.bits_per_param(double_quant=double_quant) == pytest.approx(expected, abs=4e-4)
        assert sum(x.nbytes for x in jax.tree.leaves(quantized["w"])) == quantized["w"].nbytes


def test_blocks_must_be_whole():
    with pytest.raises(ValueError, match="63 numbers are no whole blocks of 64"):
        nf4.encode(jnp.ones(63))
