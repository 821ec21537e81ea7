"""BERT's names in Hugging Face files: which tensor is which parameter, and what is left aside."""

import re
from collections.abc import Mapping

import numpy as np

from lora_jax.models.bert import BertConfig
from lora_jax.models.hf_names import Entry

# Known and not needed: an index buffer; BERT's own pooler (the task head here stands on the pooling
# of the model's card); the heads of pretraining and of other people's tasks.
IGNORED = (
    r"embeddings\.position_ids",
    r"pooler\.dense\.(weight|bias)",
    r"cls\.predictions\..*",
    r"cls\.seq_relationship\.(weight|bias)",
    r"(classifier|qa_outputs)\.(weight|bias)",
)


def bert_entries(config: BertConfig) -> list[Entry]:
    """Returns the entry of every parameter of the encoder."""
    entries = [
        Entry(f"embeddings.{name}_embeddings.weight", f"embeddings/{name}/embedding")
        for name in ("word", "position", "token_type")
    ]
    entries += _norm("embeddings.LayerNorm", "embeddings/norm")
    for i in range(config.num_hidden_layers):
        theirs, ours = f"encoder.layer.{i}", f"encoder/layers/{i}"
        for name in ("query", "key", "value"):
            entries += _linear(f"{theirs}.attention.self.{name}", f"{ours}/attention/{name}")
        entries += _linear(f"{theirs}.attention.output.dense", f"{ours}/attention/output")
        entries += _norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/attention/norm")
        entries += _linear(f"{theirs}.intermediate.dense", f"{ours}/mlp/intermediate")
        entries += _linear(f"{theirs}.output.dense", f"{ours}/mlp/output")
        entries += _norm(f"{theirs}.output.LayerNorm", f"{ours}/mlp/norm")
    return entries


def bert_canonical(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the tensors under `BertModel`'s own names.

    Files of models with a head prefix them with "bert."; files converted from TensorFlow call a
    layer norm's weight and bias gamma and beta.
    """

    def canonical(name: str) -> str:
        name = name.removeprefix("bert.")
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)

    renamed = {canonical(name): tensor for name, tensor in tensors.items()}
    # Two names for one tensor: keep the file's own, so that one of them is reported as unexpected.
    return renamed if len(renamed) == len(tensors) else dict(tensors)


def _linear(tensor: str, path: str) -> list[Entry]:
    return [
        Entry(f"{tensor}.weight", f"{path}/kernel", is_transposed=True),
        Entry(f"{tensor}.bias", f"{path}/bias"),
    ]


def _norm(tensor: str, path: str) -> list[Entry]:
    return [Entry(f"{tensor}.weight", f"{path}/scale"), Entry(f"{tensor}.bias", f"{path}/bias")]
