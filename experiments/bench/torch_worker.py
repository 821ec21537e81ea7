"""The torch side of `torch_pair.py`: trains MiniLM by command, one step a line on stdin.

Runs in an environment with torch, transformers and peft, without JAX.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertConfig, BertModel


class Classifier(torch.nn.Module):
    def __init__(self, folder: str):
        super().__init__()
        config = BertConfig.from_pretrained(folder, attn_implementation="eager")
        config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
        self.bert = BertModel.from_pretrained(folder, config=config, add_pooling_layer=False)
        self.head = torch.nn.Linear(config.hidden_size, 2)

    def forward(self, input_ids, attention_mask):
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].float()
        return self.head((states * mask).sum(1) / mask.sum(1))


def make(method: str, folder: str):
    model = Classifier(folder)
    if method != "full":
        targets = {
            "lora-qv": ["query", "value"],
            "lora-all": ["query", "key", "value", "dense"],
        }[method]
        config = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets, modules_to_save=["head"]
        )
        model = get_peft_model(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.01)


def main() -> None:
    folder, data, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(threads)
    arrays = np.load(data)
    batch = {k: torch.from_numpy(arrays[k]).long() for k in ("input_ids", "attention_mask")}
    labels = torch.from_numpy(arrays["labels"]).long()
    made = {name: make(name, folder) for name in ("lora-qv", "lora-all", "full")}
    print(json.dumps({"torch": torch.__version__}), flush=True)
    for line in sys.stdin:
        model, optimizer = made[line.strip()]
        start = time.perf_counter()
        optimizer.zero_grad(set_to_none=True)
        loss = torch.nn.functional.cross_entropy(model(**batch), labels)
        loss.backward()
        optimizer.step()
        print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss.item()}), flush=True)


if __name__ == "__main__":
    main()
