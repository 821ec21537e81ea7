"""BERT's names in Hugging Face files: which tensor is which parameter, and what is left aside."""

from lora_jax.models.bert.modeling import ALIASES, Bert, BertConfig
from lora_jax.models.family import ENCODER, Family
from lora_jax.models.hf_names import Entry, linear, norm


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


BERT = Family(
    kind=ENCODER,
    config=BertConfig,
    module=Bert,
    entries=bert_entries,
    # Known and not needed: an index buffer; the heads of pretraining and of other people's tasks.
    ignored=(
        r"embeddings\.position_ids",
        r"cls\.predictions\..*",
        r"cls\.seq_relationship\.(weight|bias)",
        r"qa_outputs\.(weight|bias)",
    ),
    aliases=lambda config: ALIASES,
    # The pooler belongs to the encoder, and only its own classifier stands on it.
    pooler=linear("pooler.dense", "pooler"),
    classifier=linear("classifier", "head"),
    prefix="bert.",
    head_modules=("classifier",),
    class_name=lambda config: "Bert",
)
