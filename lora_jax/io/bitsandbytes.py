"""Four-bit matrices as bitsandbytes writes them into safetensors: what transformers calls
`load_in_4bit` with `nf4`, and what most quantised folders on the hub hold.

`NAME.weight` are the bytes (n / 2, 1) of a matrix (out, in); next to it are `NAME.weight.absmax`
(scales), `.quant_map` (the table), `.quant_state.bitsandbytes__nf4` (JSON as bytes: shape, dtype,
block sizes) and, where the scales are quantised too, `.nested_absmax` and `.nested_quant_map`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.io.lazy import LazyMapping
from lora_jax.io.untrusted import parse_json
from lora_jax.quant import nf4
from lora_jax.quant.weight import NF4Weight

STATE = ".quant_state.bitsandbytes__nf4"
_OTHER_STATES = (".quant_state.bitsandbytes__fp4", ".SCB")
_SIDES = (".absmax", ".quant_map", STATE, ".nested_absmax", ".nested_quant_map")
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclasses.dataclass(frozen=True)
class Nf4Matrix:
    """A matrix of a file that is stored in NF4: `shape` (out, in), `dtype` what it stands for."""

    weight: NF4Weight
    shape: tuple[int, int]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.weight.dtype)

    def to_kernel(self, path: str, dtype: Any = None) -> NF4Weight:
        """The kernel (in, out) at `path`; `dtype` is what it dequantises to, None as stored."""
        stored = self.weight.stored_dtype if dtype is None else jnp.dtype(dtype)
        return dataclasses.replace(self.weight, path=path, stored_dtype=stored)


def nf4_tensors(tensors: Mapping[str, np.ndarray], place: str) -> Mapping[str, Any]:
    """A file's tensors with each quantised matrix as one `Nf4Matrix`; the others as they are."""
    if found := [name for name in tensors if name.endswith(_OTHER_STATES)]:
        raise RequestError(
            f"{place} holds {found[0]}: a bitsandbytes format other than NF4, which is not "
            "read; save the model in 16 bits, or quantise it as nf4"
        )
    stored = {name.removesuffix(STATE) for name in tensors if name.endswith(STATE)}
    sides = {name + side for name in stored for side in _SIDES}

    def read(name: str) -> Any:
        return _read(tensors, name, place) if name in stored else tensors[name]

    return LazyMapping([name for name in tensors if name not in sides], read)


@dataclasses.dataclass(frozen=True)
class _Quantized:
    """The tensors of one quantized matrix in a file, read with checks."""

    tensors: Mapping[str, np.ndarray]
    name: str
    place: str

    def fail(self, what: str) -> RequestError:
        return RequestError(
            f"{self.place}: {self.name} {what}; download or quantise the model again"
        )

    def state(self) -> tuple[tuple[int, int], str, bool, Any]:
        """The matrix' shape and dtype, whether its scales are quantized too, and their offset."""
        try:
            state = parse_json(bytes(np.asarray(self.tensors[self.name + STATE], np.uint8)))
            shape, block = tuple(state["shape"]), state["blocksize"]
            dtype, nested = state["dtype"], state.get("nested_blocksize")
        except (ValueError, KeyError, TypeError) as error:
            raise self.fail(f"has no readable quantisation state ({error!r})") from error
        if (block, nested) not in ((nf4.BLOCK, None), (nf4.BLOCK, nf4.SCALE_BLOCK)):
            raise RequestError(
                f"{self.place}: {self.name} has blocks of {block} and {nested}; blocks of "
                f"{nf4.BLOCK}, and of {nf4.SCALE_BLOCK} scales, are read (bitsandbytes' defaults)"
            )
        is_shape = len(shape) == 2 and all(isinstance(n, int) and n > 0 for n in shape)
        if not is_shape or dtype not in _DTYPES:
            raise self.fail(f"says shape {shape} and dtype {dtype!r}")
        return shape, dtype, nested is not None, state.get("nested_offset", np.nan)

    def codes(self, shape: tuple[int, int]) -> np.ndarray:
        """Two numbers per byte."""
        size = math.prod(shape)
        codes = np.asarray(self.tensors[self.name]).reshape(-1)
        if codes.dtype != np.uint8 or codes.size != -(-size // 2):
            raise self.fail(
                f"holds {codes.size} of {codes.dtype} for the {size} numbers of {shape}"
            )
        return codes

    def side(self, suffix: str, kind: Any, length: int) -> np.ndarray:
        """The tensor of this suffix, which must have this dtype and length."""
        if self.name + suffix not in self.tensors:
            raise self.fail(f"lacks {suffix}")
        array = np.asarray(self.tensors[self.name + suffix]).reshape(-1)
        if array.dtype != kind or array.shape != (length,):
            raise self.fail(f"has {suffix} {array.dtype} {array.shape}, not {kind} {(length,)}")
        return array

    def scales(self, num_blocks: int, nested: bool, offset: Any) -> dict[str, np.ndarray]:
        """The scales of the blocks; where these are quantized too, what they are made from."""
        if not np.array_equal(self.side(".quant_map", np.float32, 16), nf4.CODEBOOK):
            raise self.fail("has another table than NF4's")
        if not nested:
            found = {"scales": self.side(".absmax", np.float32, num_blocks)}
        else:
            scales = self.side(".absmax", np.uint8, num_blocks)
            if not np.array_equal(self.side(".nested_quant_map", np.float32, 256), nf4.SCALE_CODES):
                raise self.fail("has another table for its scales")
            num_outer = -(-num_blocks // nf4.SCALE_BLOCK)
            outer = self.side(".nested_absmax", np.float32, num_outer)
            found = {"scales": scales, "block_scales": outer, "mean": np.float32(offset)}
        if not all(np.isfinite(np.asarray(array, np.float32)).all() for array in found.values()):
            raise self.fail("has scales that are NaN or infinite")
        return found


def _read(tensors: Mapping[str, np.ndarray], name: str, place: str) -> Nf4Matrix:
    file = _Quantized(tensors, name, place)
    shape, dtype, nested, offset = file.state()
    codes = file.codes(shape)
    num_blocks = -(-math.prod(shape) // nf4.BLOCK)
    scales = file.scales(num_blocks, nested, offset)
    rows = shape[0] if shape[1] % nf4.BLOCK == 0 else 1
    nested_scales: dict[str, Any] = {
        name: jnp.asarray(array) for name, array in scales.items() if name != "scales"
    }
    codes = np.pad(codes, (0, num_blocks * nf4.BLOCK // 2 - codes.size), constant_values=0x77)
    weight = NF4Weight(
        kernel=jnp.asarray(codes.reshape(rows, -1)),
        scales=jnp.asarray(scales["scales"].reshape(rows, -1)),
        **nested_scales,
        roles="io",
        path="",
        matrix=(shape[1], shape[0]),
        stored_dtype=jnp.dtype(dtype),
    )
    return Nf4Matrix(weight, (shape[0], shape[1]))


def to_tensors(name: str, kernel: NF4Weight) -> dict[str, np.ndarray]:
    """`{tensor name: array}` of one quantised kernel (in, out) under its name in the file."""
    inputs, outputs = kernel.matrix
    size = inputs * outputs
    codes = np.asarray(kernel.kernel).reshape(-1)[: -(-size // 2)]
    state: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": nf4.BLOCK,
        "dtype": str(jnp.dtype(kernel.stored_dtype)),
        "shape": [outputs, inputs],
    }
    tensors = {
        name: codes.reshape(-1, 1),
        f"{name}.absmax": np.asarray(kernel.scales).reshape(-1),
        f"{name}.quant_map": nf4.CODEBOOK,
    }
    if kernel.mean is not None:
        state |= {"nested_blocksize": nf4.SCALE_BLOCK, "nested_dtype": "float32"}
        state["nested_offset"] = float(kernel.mean)
        tensors[f"{name}.nested_absmax"] = np.asarray(kernel.block_scales).reshape(-1)
        tensors[f"{name}.nested_quant_map"] = nf4.SCALE_CODES
    tensors[name + STATE] = np.frombuffer(json.dumps(state).encode(), np.uint8)
    return tensors


def quantization_config(kernels: Iterable[NF4Weight], plain: Iterable[str]) -> dict[str, Any]:
    """What config.json says of a folder with quantised kernels; `plain` are modules that are not.

    transformers makes every linear module but `plain` a four-bit one.
    """
    kernels = list(kernels)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": kernels[0].mean is not None,
        "bnb_4bit_compute_dtype": str(jnp.dtype(kernels[0].stored_dtype)),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(plain),
    }


def is_quantized_config(config: Mapping[str, Any], place: str) -> bool:
    """Whether a config.json is of a folder in this format. Raises `RequestError` for another."""
    found = config.get("quantization_config")
    if found is None:
        return False
    method = found.get("quant_method") if isinstance(found, dict) else found
    is_nf4 = isinstance(found, dict) and found.get("bnb_4bit_quant_type") == "nf4"
    if method == "bitsandbytes" and found.get("load_in_4bit") and is_nf4:
        return True
    raise RequestError(
        f"{place} says that the weights are quantised by {method!r}, which is not read; "
        "bitsandbytes' nf4 is, or load the model in 16 bits and quantise it here"
    )
