"""`tiny-bert`: a random 2-layer BERT and a 100-word tokenizer, made in code for smoke runs.

It knows nothing, but a task of its own words can be learned on it in seconds, on any machine,
without a package or a network.
"""

import numpy as np
from flax import nnx
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from lora_jax.models.bert import BertConfig
from lora_jax.models.checkpoint import Checkpoint
from lora_jax.models.families import FAMILIES
from lora_jax.models.functional import functional
from lora_jax.models.sources import TINY_BERT

_SEED = 1810_04805
_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# The commonest words of English, then those of reviews: every sentence of the tests' own making.
_WORDS = """
the a an and or but of to in on for with as at by from is are was were be been it its this that
these those he she they we you i his her their our my not no never very too so more most less than
all some any one two what who when how if then there here up out off about into over only just even
good great fine best better nice lovely brilliant superb moving funny charming clever warm fresh
bad awful poor worst worse dull boring terrible weak stupid flat tired empty slow messy loud
film movie story plot scene acting actor actors director script music end ending time work
"""


def make_tiny_bert() -> Checkpoint:
    """Returns the checkpoint; the same weights and words every time, on every machine."""
    tokenizer = _tokenizer()
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    family = FAMILIES["bert"]
    shapes, _ = functional(lambda: family.module(config, rngs=nnx.Rngs(0)))
    params = _weights(shapes, config.initializer_range)
    return Checkpoint(TINY_BERT, family, config, params, tokenizer, pooling="mean")


def _weights(shapes, std: float) -> dict[str, np.ndarray]:
    generator = np.random.Generator(np.random.PCG64(_SEED))
    params = {}
    for path in sorted(shapes):
        shape = shapes[path].shape
        if path.endswith("/scale"):
            params[path] = np.ones(shape, np.float32)
        elif path.endswith("/bias"):
            params[path] = np.zeros(shape, np.float32)
        else:
            params[path] = (std * generator.standard_normal(shape)).astype(np.float32)
    return params


def _tokenizer() -> Tokenizer:
    words = [*_SPECIAL, *_WORDS.split(), *".,!?'"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer
