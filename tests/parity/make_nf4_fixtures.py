"""Writes what bitsandbytes makes of random weights: a Llama that transformers loaded in four bits
and saved, with and without double quantisation, and single matrices of odd shapes.

    .venv-torch/bin/python tests/parity/make_nf4_fixtures.py

Matrices go through bitsandbytes' kernels in torch ("default"): its kernels in C for the CPU look
scales up in a table that is not always the nearest, and read a matrix whose rows are no whole
blocks in another way than they were written (0.50.2). Logits are of the dequantised model.
"""

import importlib
import os
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing here is worth a compiler

import bitsandbytes.functional as bnb
import numpy as np
import torch
import transformers
from bitsandbytes import _ops
from bitsandbytes.backends.default import ops
from safetensors.numpy import save_file

FOLDER = Path(__file__).parents[1] / "fixtures" / "nf4"
IDS = np.array([[1, 5, 9, 33, 2, 60], [7, 7, 0, 12, 63, 4]])
SHAPES = ((64, 64), (7, 10), (64, 96), (3, 320), (17, 1024))


def write_llamas() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(FOLDER / "llama")
    for name, double in (("llama_double", True), ("llama_single", False)):
        how = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        quantised = transformers.AutoModelForCausalLM.from_pretrained(
            FOLDER / "llama", quantization_config=how, dtype=torch.float32
        )
        quantised.save_pretrained(FOLDER / name)
        # (What was just quantised cannot be dequantised in transformers 5.23; what was saved can.)
        quantised = transformers.AutoModelForCausalLM.from_pretrained(
            FOLDER / name, dtype=torch.float32
        )
        quantised.dequantize()
        with torch.no_grad():
            logits = quantised.eval()(input_ids=torch.from_numpy(IDS)).logits
        save_file({"ids": IDS, "logits": logits.numpy()}, FOLDER / f"{name}_states.safetensors")
        (FOLDER / name / "generation_config.json").unlink()
    (FOLDER / "llama" / "generation_config.json").unlink()


def write_matrices() -> None:
    code = bnb.create_dynamic_map()
    tensors = {"scale_codes": code.numpy(), "table": bnb.get_4bit_type("nf4", device="cpu").numpy()}
    quantize = _kernel("quantize_4bit")
    for number, shape in enumerate(SHAPES):
        torch.manual_seed(number)
        weight = 0.1 * torch.randn(shape)
        if number == 0:
            weight[0] = 0  # a block of zeros
        packed, scales = quantize(weight, 64, "nf4", torch.uint8)
        mean = scales.mean()
        scale_codes, block_scales = _kernel("quantize_blockwise")(scales - mean, code, 256)
        decoded = ops._dequantize_blockwise_compute(
            scale_codes, block_scales, code, 256, torch.float32
        )
        values = {
            name: ops._dequantize_4bit_compute(
                packed.reshape(-1), of, bnb.get_4bit_type("nf4", device="cpu"), 64, shape,
                torch.float32,
            )
            for name, of in (("single", scales), ("double", decoded + mean))
        }  # fmt: skip
        found = {
            "weight": weight, "packed": packed.reshape(-1), "scales": scales, "mean": mean,
            "scale_codes": scale_codes, "block_scales": block_scales, **values,
        }  # fmt: skip
        tensors |= {f"{number}.{name}": x.numpy() for name, x in found.items()}
    save_file(tensors, FOLDER / "matrices.safetensors")


def _kernel(name: str):
    """bitsandbytes' kernel in torch: what it registers for devices that it has no other for."""
    return KERNELS[f"bitsandbytes::{name}"]


def _captured() -> dict:
    """`{operator: kernel}` of bitsandbytes' module of kernels in torch, by reading it once more."""
    found, register = {}, _ops.register_kernel

    def capture(operator, _device):
        return lambda kernel: found.setdefault(operator, kernel)

    _ops.register_kernel = capture
    try:
        importlib.reload(ops)
    finally:
        _ops.register_kernel = register
    return found


KERNELS = _captured()

if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_llamas()
    write_matrices()
