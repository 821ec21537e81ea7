"""BERT's names in Hugging Face files: which tensor is which parameter, and what is left aside."""

import re
from collections.abc import Iterable

from lora_jax.models.bert.modeling import BertConfig
from lora_jax.models.hf_names import Entry, linear, norm

# Known and not needed: an index buffer; the heads of pretraining and of other people's tasks.
IGNORED = (
    r"embeddings\.position_ids",
    r"cls\.predictions\..*",
    r"cls\.seq_relationship\.(weight|bias)",
    r"qa_outputs\.(weight|bias)",
)
PREFIX = "bert."
HEAD_MODULES = ("classifier",)
# The pooler belongs to the encoder, and only its own classifier stands on it.
POOLER = tuple(linear("pooler.dense", "pooler"))
CLASSIFIER = tuple(linear("classifier", "head"))


def bert_entries(config: BertConfig) -> list[Entry]:
    """Returns the entry of every parameter of the encoder."""
    entries = [
        Entry(f"embeddings.{name}_embeddings.weight", f"embeddings/{name}/embedding")
        for name in ("word", "position", "token_type")
    ]
    entries += norm("embeddings.LayerNorm", "embeddings/norm")
    for i in range(config.num_hidden_layers):
        theirs, ours = f"encoder.layer.{i}", f"encoder/layers/{i}"
        for name in ("query", "key", "value"):
            entries += linear(f"{theirs}.attention.self.{name}", f"{ours}/attention/{name}")
        entries += linear(f"{theirs}.attention.output.dense", f"{ours}/attention/output")
        entries += norm(f"{theirs}.attention.output.LayerNorm", f"{ours}/attention/norm")
        entries += linear(f"{theirs}.intermediate.dense", f"{ours}/mlp/intermediate")
        entries += linear(f"{theirs}.output.dense", f"{ours}/mlp/output")
        entries += norm(f"{theirs}.output.LayerNorm", f"{ours}/mlp/norm")
    return entries


def bert_names(names: Iterable[str], prefix: str = PREFIX) -> dict[str, str]:
    """`{the bare encoder's name of a tensor: its name in the file}`.

    Files of models with a head prefix them with "bert."; files converted from TensorFlow call a
    layer norm's weight and bias gamma and beta.
    """

    def canonical(name: str) -> str:
        name = name.removeprefix(prefix)
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        return re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)

    names = list(names)
    renamed = {canonical(name): name for name in names}
    # Two names for one tensor: keep the file's own, so that one of them is reported as unexpected.
    return renamed if len(renamed) == len(names) else {name: name for name in names}
