"""`lora-jax generate`: a base and adapters, from a run's folder and from PEFT's, side by side."""

from __future__ import annotations

import json

import jax
import pytest

import lora_jax as lj
from lora_jax.cli.main import main
from lora_jax.generate import Decoding, generate_text
from lora_jax.io.run_adapter import save_trainable
from lora_jax.models import load_model
from lora_jax.peft import load as peft

PROMPTS = ["a film", "[bold]b[/bold]"]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """`(model, params with the adapter, run's folder, PEFT's folder)`: the same adapter twice."""
    folder = tmp_path_factory.mktemp("adapters")
    model = load_model("tiny-llama")
    settings = {"name": "lora", "targets": "q,v", "rank": 2, "alpha": 8.0}
    method = lj.LoRA(targets="q,v", rank=2, alpha=8.0, axes=model.axes, aliases=model.aliases)
    trainable, _ = method.init(jax.random.key(0), model.params)
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [0.5 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    trainable = jax.tree.unflatten(treedef, drawn)
    description = {
        "model": {
            "name": "tiny-llama",
            "head": "causal-lm",
            "num_labels": None,
            "dtype": "float32",
        },
        "method": settings,
        "seed": 0,
        "base_hash": model.base_hash,
    }
    run = folder / "cells" / "mine"
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    save_trainable(run / "adapter", trainable, description)
    peft.save_adapter(folder / "theirs", method, trainable, model)
    return model, method.bind(trainable, model.params), run, folder / "theirs"


def test_a_base_and_its_adapters_answer_side_by_side(adapters, capsys):
    model, bound, run, theirs = adapters
    args = ["generate", f"--adapter={run}", f"--adapter={theirs}", "--max-new-tokens=6"]
    args += [f"--prompt={text}" for text in PROMPTS]
    assert main([*args, "--json"]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["model"] == "tiny-llama" and found["prompts"] == PROMPTS
    base, mine, other = found["answers"]
    assert [one["name"] for one in found["answers"]] == ["base", "mine", "theirs"]
    # As the run was trained: an end of text closes each prompt, whoever answers.
    closed = [f"{text}<|endoftext|>" for text in PROMPTS]
    assert base["texts"] == generate_text(model, model.params, closed, Decoding(6))
    assert mine["texts"] == other["texts"] == generate_text(model, bound, closed, Decoding(6))
    assert mine["texts"] != base["texts"]
    assert main([*args, "--json", "--open-prompt"]) == 0
    opened = json.loads(capsys.readouterr().out)["answers"][0]["texts"]
    assert opened == generate_text(model, model.params, PROMPTS, Decoding(6)) != base["texts"]
    assert 2 <= base["tokens"] <= 12 and base["tokens_per_s"] > 0
    assert captured.err.count("tokens/s") == 3
    # In a pipe: a block for each prompt, nothing taken for markup.
    assert main([*args, f"--model={model.name}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("> a film\n[base] ") and "> [bold]b[/bold]\n" in out


def test_prompts_come_from_a_file_and_drawing_is_turned_on_by_its_options(tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("a film\n\nb\n")
    args = ["generate", "--model=tiny-llama", f"--prompts-file={file}", "--max-new-tokens=6"]
    answers = []
    for extra in (["--seed=1"], ["--seed=1"], ["--temperature=0.9"]):
        assert main([*args, *extra, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["prompts"] == ["a film", "b"]
        answers.append(found["answers"][0]["texts"])
    assert answers[0] == answers[1] != answers[2]


TINY = ["generate", "--model=tiny-llama"]
BAD = {
    "no prompt": (TINY, "--prompt=TEXT"),
    "no model": (["generate", "--prompt=a"], "--model is missing"),
    "empty prompt": ([*TINY, "--prompt="], "prompt 0 is ''"),
    "no file": ([*TINY, "--prompts-file=/no/such"], "/no/such"),
    "no chat": ([*TINY, "--prompt=a", "--chat"], "<|im_start|>"),
    "no adapter": ([*TINY, "--prompt=a", "--adapter=/no/such"], "/no/such"),
    "an encoder": (["generate", "--model=tiny-bert", "--prompt=a"], "no language model"),
    "too many beams": ([*TINY, "--prompt=a", "--num-beams=2", "--top-k=3"], "num_beams=2"),
    "penalty alone": ([*TINY, "--prompt=a", "--length-penalty=2"], "length_penalty=2.0"),
    "too long": (
        ["generate", "--model=tiny-gpt2", "--prompt=abc", "--max-new-tokens=600"], "512",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_names_the_value_and_prints_no_answer(name, capsys):
    argv, words = BAD[name]
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert words in captured.err.splitlines()[-1] and not captured.out


def test_a_peft_adapter_alone_brings_its_base(adapters, capsys):
    model, bound, _, theirs = adapters
    argv = ["generate", f"--adapter={theirs}", "--prompt=a film", "--max-new-tokens=4", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "tiny-llama" and [a["name"] for a in found["answers"]][1:] == [
        "theirs"
    ]
    wanted = generate_text(model, bound, ["a film"], Decoding(4))
    assert found["answers"][1]["texts"] == wanted


def test_an_adapter_of_another_base_is_refused(adapters, tmp_path, capsys):
    model, _, run, _ = adapters
    argv = ["generate", "--model=tiny-gpt2", "--prompt=a", "--max-new-tokens=2"]
    assert main([*argv, f"--adapter={run}"]) == 2
    assert "on other weights than 'tiny-llama'" in capsys.readouterr().err
