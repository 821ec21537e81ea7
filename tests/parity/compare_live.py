"""Random models of every family, beyond the fixtures: transformers' numbers beside ours.

One command, in the environment with torch (CPU) and transformers:

    .venv-torch/bin/python tests/parity/compare_live.py .venv-3.11/bin/python

It draws 32 configs (`--seed`, `--number`): shapes, heads, biases, norms, rotations, windows, ties,
heads for tasks. Each becomes a folder with inputs and transformers' logits and hidden states in a
temporary directory, which the given Python, with lora_jax, then loads. Exits with 1 where a number
differs by more than 5e-5.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

TOLERANCE = 5e-5
KINDS = ("llama", "mistral", "qwen2", "gpt2", "bert", "roberta")
TASKS = (None, None, "classification", "regression")


def draw_config(rng: np.random.Generator, kind: str, task: str | None):
    """`(transformers' class, config)`."""
    import transformers

    pick = lambda *choices: choices[rng.integers(len(choices))]  # noqa: E731
    heads, num_layers = pick(1, 2, 3, 4, 6), pick(1, 2, 3, 4)
    width = heads * pick(4, 6, 8, 10)
    vocab_size, inner = int(rng.integers(40, 120)), int(rng.integers(9, 60))
    labels = {"classification": {"num_labels": pick(2, 3, 5)}, "regression": {"num_labels": 1}}
    common = {"vocab_size": vocab_size, **labels.get(task, {})}
    sizes = {
        **common, "hidden_size": width, "num_hidden_layers": num_layers,
        "num_attention_heads": heads, "intermediate_size": inner,
    }  # fmt: skip
    activation = pick("gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh", "tanh")
    epsilon = pick(1e-12, 1e-6, 1e-5, 1e-3)
    if kind == "gpt2":
        model = {None: "GPT2LMHeadModel"}.get(task, "GPT2ForSequenceClassification")
        return model, transformers.GPT2Config(
            **common, n_embd=width, n_layer=num_layers, n_head=heads, n_positions=32,
            n_inner=pick(None, inner), activation_function=activation, bos_token_id=2,
            eos_token_id=2, layer_norm_epsilon=epsilon, tie_word_embeddings=pick(True, False),
            pad_token_id=pick(0, 1) if task else pick(None, 0),
        )  # fmt: skip
    if kind in ("bert", "roberta"):
        name, pad = {"bert": ("Bert", 0), "roberta": ("Roberta", 1)}[kind]
        config = getattr(transformers, f"{name}Config")(
            **sizes, max_position_embeddings=40, type_vocab_size=pick(1, 2), hidden_act=activation,
            layer_norm_eps=epsilon, pad_token_id=pick(pad, 0, 3), bos_token_id=2, eos_token_id=2,
        )  # fmt: skip
        return f"{name}{'ForSequenceClassification' if task else 'Model'}", config
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    theta = pick(100.0, 10000.0, 500000.0)
    rope = pick(
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": pick(2.0, 4.0)},
        {
            "rope_type": "llama3", "factor": pick(2.0, 8.0), "low_freq_factor": 1.0,
            "high_freq_factor": pick(2.0, 4.0), "original_max_position_embeddings": pick(8, 32, 48),
        },
    )  # fmt: skip
    fields = {
        **sizes, "num_key_value_heads": pick(*divisors), "max_position_embeddings": 64,
        "hidden_act": pick("silu", activation), "rms_norm_eps": max(epsilon, 1e-6),
        "rope_parameters": {**rope, "rope_theta": theta}, "tie_word_embeddings": pick(True, False),
        "pad_token_id": pick(0, 3) if task else pick(None, 0), "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[kind]
    if kind == "llama":
        fields |= {"attention_bias": pick(True, False), "mlp_bias": pick(True, False)}
    if kind == "mistral":
        fields |= {"sliding_window": pick(None, 3, 7, 100)}
    if kind != "qwen2":
        fields |= {"head_dim": pick(None, 4, 12)}
    head = "SequenceClassification" if task else "CausalLM"
    return f"{name}For{head}", getattr(transformers, f"{name}Config")(**fields)


def write_models(directory: Path, number: int, seed: int) -> None:
    """A folder with inputs and outputs for each of `number` random models, by transformers."""
    import torch
    from safetensors.numpy import save_file
    from torch_families import load_folder, make_inputs, outputs, random_model

    torch.set_num_threads(1)
    for case in range(number):
        rng = np.random.default_rng([seed, case])
        kind, task = KINDS[case % len(KINDS)], TASKS[case // len(KINDS) % len(TASKS)]
        class_name, config = draw_config(rng, kind, task)
        name = f"{case:03d}-{kind}-{task or 'none'}"
        model = random_model(class_name, config, int(rng.integers(2**31)))
        # Some in several files, some in one.
        model.save_pretrained(directory / name, max_shard_size=("6KB", "1GB")[case // 2 % 2])
        time = int(rng.integers(5, 24))
        rows = [_columns(rng, time) for _ in range(int(rng.integers(1, 6)))]
        inputs = make_inputs(config, int(rng.integers(2**31)), rows, time)
        arrays = outputs(load_folder(directory / name), inputs)
        arrays = {k: np.ascontiguousarray(x) for k, x in {**inputs, **arrays}.items()}
        save_file(arrays, directory / f"{name}.safetensors")


def _columns(rng: np.random.Generator, time: int):
    """Columns of one row that hold no padding: padded on one side or both, or with holes."""
    start = int(rng.integers(0, time))
    stop = int(rng.integers(start + 1, time + 1))
    kinds = (
        range(time),
        range(stop),
        range(start, time),
        range(start, stop),
        np.flatnonzero(rng.random(time) < 0.7),
    )
    columns = kinds[rng.integers(len(kinds))]
    return columns if len(columns) else range(time)


def compare(directory: Path) -> bool:
    """Prints the largest difference of each model here; False if one is above `TOLERANCE`."""
    from lora_jax.io.safetensors import read_tensors

    worst: dict[str, float] = {}
    for folder in sorted(path for path in directory.iterdir() if path.is_dir()):
        _, kind, task = folder.name.split("-")
        wanted = read_tensors(f"{folder}.safetensors")
        stacked = (False,) if kind in ("bert", "roberta") else (False, True)
        for scan_layers in stacked:
            difference = _difference(folder, wanted, None if task == "none" else task, scan_layers)
            worst[kind] = max(worst.get(kind, 0.0), difference)
            label = " stacked" if scan_layers else ""
            verdict = "" if difference <= TOLERANCE else "  <-- too much"
            print(f"{folder.name}{label}: {difference:.1e}{verdict}", flush=True)
    for kind, difference in worst.items():
        print(f"{kind}: largest difference {difference:.1e} (at most {TOLERANCE:.0e})")
    return all(difference <= TOLERANCE for difference in worst.values())


def _difference(folder: Path, wanted, head: str | None, scan_layers: bool) -> float:
    import jax

    from lora_jax.models import load_model

    model = load_model(folder, head=head, tokenizer=False, scan_layers=scan_layers)
    ids, mask = wanted["input_ids"], wanted["attention_mask"]
    apply = jax.jit(
        lambda params: model.apply(params, ids, mask, output_hidden_states=True),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    output, states = apply(model.params)
    found = {"states": np.stack([h[mask == 1] for h in states])}
    if "logits" in wanted:
        found["logits"] = np.asarray(output)[mask == 1] if output.ndim == 3 else output
    # NaN must count as a difference, and shapes must agree: `max` and broadcasting hide both.
    for name, array in found.items():
        if array.shape != wanted[name].shape or not np.isfinite(array).all():
            return float("inf")
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in found)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("python", nargs="?", help="a Python that has lora_jax")
    parser.add_argument("--number", type=int, default=32, help="of random models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compare", type=Path, help=argparse.SUPPRESS)  # the second stage
    arguments = parser.parse_args()
    if arguments.compare:
        return 0 if compare(arguments.compare) else 1
    if arguments.python is None:
        parser.error("name a Python that has lora_jax, as .venv-3.11/bin/python")
    with tempfile.TemporaryDirectory() as directory:
        write_models(Path(directory), arguments.number, arguments.seed)
        command = [arguments.python, __file__, "--compare", directory]
        return subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}).returncode


if __name__ == "__main__":
    sys.exit(main())
