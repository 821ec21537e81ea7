"""A ten-word tokenizer and tables of labelled texts, so that no test needs a download."""

import json

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

WORDS = ("a", "dull", "sharp", "film", "and", "very", "not", "funny")


@pytest.fixture
def tokenizer():
    """[PAD]=3 [UNK]=0 [CLS]=1 [SEP]=2, then `WORDS` from 4; adds [CLS] and [SEP]."""
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3}
    vocabulary |= {word: 4 + i for i, word in enumerate(WORDS)}
    built = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    built.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return built


@pytest.fixture
def write_jsonl(tmp_path):
    """Writes (text, label) pairs as JSON Lines under a name and returns the path."""

    def write(name, pairs, columns=("text", "label")):
        path = tmp_path / name
        lines = [json.dumps(dict(zip(columns, pair, strict=True))) for pair in pairs]
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write
