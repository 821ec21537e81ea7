"""RoBERTa's names in Hugging Face files: BERT's, under another prefix, and a head of its own."""

from __future__ import annotations

import dataclasses

from lora_jax.models.bert.hf import BERT
from lora_jax.models.hf_names import linear
from lora_jax.models.roberta.modeling import ALIASES, Roberta, RobertaConfig

ROBERTA = dataclasses.replace(
    BERT,
    config=RobertaConfig,
    module=Roberta,
    # Known and not needed: index buffers, a pooler that RoBERTa's own heads do not use, and the
    # heads of pretraining and of other people's tasks.
    ignored=(
        r"embeddings\.(position_ids|token_type_ids)",
        r"pooler\.dense\.(weight|bias)",
        r"lm_head\..*",
        r"qa_outputs\.(weight|bias)",
    ),
    aliases=lambda config: ALIASES,
    pooler=(),
    classifier=(
        *linear("classifier.dense", "head/dense"),
        *linear("classifier.out_proj", "head/out_proj"),
    ),
    prefix="roberta.",
    class_name=lambda config: "Roberta",
)
