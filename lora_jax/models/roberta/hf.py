"""RoBERTa's names in Hugging Face files: BERT's, under another prefix, and a head of its own."""

from __future__ import annotations

from lora_jax.models.bert.hf import bert_entries
from lora_jax.models.hf_names import Entry, linear
from lora_jax.models.roberta.modeling import RobertaConfig

# Known and not needed: index buffers, a pooler that RoBERTa's own heads do not use, and the head of
# pretraining.
IGNORED = (
    r"embeddings\.(position_ids|token_type_ids)",
    r"pooler\.dense\.(weight|bias)",
    r"lm_head\..*",
    r"qa_outputs\.(weight|bias)",
)
PREFIX = "roberta."
HEAD_MODULES = ("classifier",)
CLASSIFIER = (
    *linear("classifier.dense", "head/dense"),
    *linear("classifier.out_proj", "head/out_proj"),
)


def roberta_entries(config: RobertaConfig) -> list[Entry]:
    """The entry of every parameter of the encoder."""
    return bert_entries(config)
