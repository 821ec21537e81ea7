"""What this project writes, opened by peft and transformers: adapters and merged models.

    make parity                                                  # this and the other comparisons

or by hand, in two steps, since nothing of ours needs torch and nothing there needs JAX:

    .venv-3.11/bin/python tests/parity/compare_written.py write /tmp/written
    .venv-torch/bin/python tests/parity/compare_written.py check /tmp/written

The first trains nothing: adapters of every kind that PEFT has words for, all of their numbers
random, on the tiny models of tests/fixtures/peft/bases, written as PEFT folders and merged into
model folders, with this project's logits. The second prints the largest difference of each and ends
with 1 above 5e-5.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

BASES = Path(__file__).resolve().parent.parent / "fixtures" / "peft" / "bases"
TOLERANCE = 5e-5
# Factors stored in float16 carry 11 bits, so the adapter's part of the logits has 3 digits.
HALF_TOLERANCE = 5e-3


def cases(lj):
    """`{name: (base, load options, settings of save_adapter, make method)}`."""
    rule = lj.Rule

    def mixed(kind):
        return lambda m: kind(
            rules=[
                rule("q", rank=2, alpha=6, layers=[1]), rule("q", rank=3, alpha=2),
                rule("down", rank=5, alpha=1), rule("o", rank=2, alpha=6),
            ],
            aliases=m.aliases, axes=m.axes,
        )  # fmt: skip

    def of(kind, targets, **settings):
        return lambda m: kind(targets=targets, aliases=m.aliases, axes=m.axes, **settings)

    def slices(m):
        w = m.config.n_embd
        fused = r".*/qkv/kernel"
        rules = [
            rule(fused, rank=2, alpha=8, slice=(-1, 0, w)),
            rule(fused, rank=3, alpha=3, slice=(-1, 2 * w, 3 * w)),
            rule("o", rank=2, alpha=8),
        ]
        return lj.LoRA(rules=rules, aliases=m.aliases, axes=m.axes)

    def lookups(m):
        from lora_jax.methods.lookup import LookupLoRA

        shared = {"aliases": m.aliases, "axes": m.axes, "rank": 2, "alpha": 4}
        return lj.Combined([lj.LoRA(targets="q", **shared), LookupLoRA(targets="embed", **shared)])

    scan, untied = {"scan_layers": True}, {"untie": True}
    bias = {"train": r".*/bias"}
    return {
        "lora": ("llama", {}, {}, of(lj.LoRA, "q,v", rank=4, alpha=8)),
        "lora-all": ("llama", {}, {}, of(lj.LoRA, "all-linear", rank=2, alpha=3)),
        "lora-mixed": ("llama", {}, {}, mixed(lj.LoRA)),
        "lora-mixed-plain": ("llama", {}, {"plain": True}, mixed(lj.LoRA)),
        "lora-mixed-half": ("llama", {}, {"dtype": "float16"}, mixed(lj.LoRA)),
        "lora-stacked": ("llama", scan, {}, of(lj.LoRA, "q,down", rank=3, alpha=8)),
        "lora-stacked-bias": ("llama", scan, {}, of(lj.LoRA, "q,down", rank=3, alpha=8, **bias)),
        "rslora-mixed": ("llama", {}, {}, mixed(lj.RsLoRA)),
        "rslora-mixed-plain": ("llama", {}, {"plain": True}, mixed(lj.RsLoRA)),
        "dora-mixed": ("llama", {}, {}, mixed(lj.DoRA)),
        "dora-stacked": ("llama", scan, {}, of(lj.DoRA, "v,up", rank=2, alpha=3)),
        "pissa": ("llama", {}, {}, of(lj.PiSSA, "q,v", rank=2, alpha=2)),
        "vera": ("llama", {}, {}, of(lj.VeRA, "q,o", rank=4)),
        "lora-xs": ("llama", {}, {}, of(lj.LoRAXS, "q,gate", rank=4, alpha=4)),
        "lora-plus": ("llama", {}, {}, of(lj.LoRAPlus, "k", rank=2, alpha=4)),
        "bias-all": ("llama", {}, {}, of(lj.LoRA, "q", rank=2, alpha=4, **bias)),
        "bias-lora": (
            "llama", {}, {}, of(lj.LoRA, "q", rank=2, alpha=4, train=r".*/attention/q/bias"),
        ),
        "norms": ("llama", {}, {}, of(lj.LoRA, "q", rank=2, alpha=4, train=r".*norm/scale")),
        "head": ("llama", {}, {}, of(lj.LoRA, "q,head,embed", rank=2, alpha=4)),
        "head-whole": ("llama", {}, {}, of(lj.LoRA, "q", rank=2, alpha=4, train="head,embed")),
        "tied-lookups": ("llama_tied", {}, {}, lookups),
        "untied": ("llama_tied", untied, {}, of(lj.LoRA, "q,embed,head", rank=2, alpha=4)),
        "qwen2": ("qwen2", {}, {}, of(lj.LoRA, "k,gate", rank=2, alpha=4, **bias)),
        "gpt2-slices": ("gpt2", {}, {}, slices),
        "gpt2-aliases": ("gpt2", {}, {}, of(lj.LoRA, "q,v", rank=4, alpha=32)),
        "gpt2-stacked": ("gpt2", scan, {}, of(lj.LoRA, "q,v,down", rank=4, alpha=32)),
        "gpt2-dora": ("gpt2", {}, {}, of(lj.DoRA, "all-linear", rank=2, alpha=3)),
        "llama-cls": ("llama_cls", {}, {}, of(lj.LoRA, "q", rank=2, alpha=4, train="head/.*")),
        "bert": ("bert", {}, {}, of(lj.LoRA, "q,v", rank=2, alpha=4)),
        "bert-cls": ("bert_cls", {}, {}, of(lj.LoRA, "q,v", rank=2, alpha=4, train="head/.*")),
        "roberta-cls": (
            "roberta_cls", {}, {}, of(lj.RsLoRA, "all-linear", rank=2, alpha=4, train="head/.*"),
        ),
    }  # fmt: skip


def write(folder: Path) -> None:
    import jax

    import lora_jax as lj
    from lora_jax.models import save_model
    from lora_jax.peft.load import save_adapter

    fixtures = load_file(BASES.parent / "expected.safetensors")
    for name, (base, options, settings, make) in cases(lj).items():
        head = "classification" if base.endswith("cls") else None
        model = lj.load_model(BASES / base, head=head, tokenizer=False, **options)
        method = make(model)
        trainable, _ = method.init(jax.random.key(0), model.params)
        key = jax.random.key(1)
        trainable = {
            place: {
                # The singular vectors of LoRA-XS and the like stay what they are.
                part: x + 0.2 * jax.random.normal(key, x.shape) * bool(method.rate_of(place, part))
                for part, x in entry.items()
            }
            for place, entry in trainable.items()
        }
        ids, mask = fixtures[f"{base}/input_ids"], fixtures[f"{base}/attention_mask"]
        save_adapter(folder / name / "adapter", method, trainable, model, **settings)
        logits = lj.lift(model.apply)(method.bind(trainable, model.params), ids, mask)
        plain = model.apply(model.params, ids, mask)
        found = {"ids": ids, "mask": mask, "logits": np.asarray(logits), "plain": np.asarray(plain)}
        if name != "tied-lookups":  # where no one table is both
            merged = method.merge(trainable, model.params)
            save_model(folder / name / "merged", model, merged)
        untied = bool(options.get("untie"))
        if untied:
            save_model(folder / name / "base", model, model.params)
        save_file(found, folder / name / "expected.safetensors")
        facts = {"base": str(folder / name / "base" if untied else BASES / base), "head": head}
        (folder / name / "case.json").write_text(json.dumps(facts))
        print(name, flush=True)


def check(folder: Path) -> int:
    import torch
    from peft import PeftModel
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    worst, failed = 0.0, False
    for case in sorted(path for path in folder.iterdir() if path.is_dir()):
        facts = json.loads((case / "case.json").read_text())
        expected = load_file(case / "expected.safetensors")
        kind = AutoModelForSequenceClassification if facts["head"] else AutoModelForCausalLM
        kind = AutoModel if case.name == "bert" else kind
        options = {"attn_implementation": "eager", "dtype": torch.float32}
        models = {
            "adapter": PeftModel.from_pretrained(
                kind.from_pretrained(facts["base"], **options), case / "adapter"
            )
        }
        if (case / "merged").exists():
            models["merged"] = kind.from_pretrained(case / "merged", **options)
        real = expected["mask"] != 0 if expected["logits"].ndim == 3 else slice(None)
        moved = np.abs(expected["logits"] - expected["plain"])[real].max()
        differences = {}
        for name, model in models.items():
            with torch.no_grad():
                output = model.eval()(
                    input_ids=torch.from_numpy(expected["ids"]).long(),
                    attention_mask=torch.from_numpy(expected["mask"]).long(),
                )
            logits = output.logits if hasattr(output, "logits") else output.last_hidden_state
            difference = np.abs(logits.numpy() - expected["logits"])[real].max()
            differences[name] = difference
        if case.name.endswith("half"):
            failed |= max(differences.values()) > HALF_TOLERANCE
        else:
            worst = max(worst, *differences.values())
        words = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        print(f"{case.name:20} {words} (the adapter moves logits by {moved:.1f})", flush=True)
        if moved < 0.05:
            sys.exit(f"{case.name}: the adapter does nothing, so this shows nothing")
    print(f"largest difference {worst:.1e}, at most {TOLERANCE:.0e}")
    return 0 if worst <= TOLERANCE and not failed else 1


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "check"):
        sys.exit(__doc__)
    step = {"write": write, "check": check}[sys.argv[1]]
    sys.exit(step(Path(sys.argv[2])))
