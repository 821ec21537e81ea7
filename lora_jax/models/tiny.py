"""Random models of each family with a small tokenizer, made in code for smoke runs and tests.

They know nothing, but a task of their own words can be learned on them in seconds, on any machine,
without a package or a network. The encoders have a 100-word tokenizer, the decoders one of bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from lora_jax.models.bert.modeling import BertConfig
from lora_jax.models.checkpoint import Checkpoint, Request, change_config
from lora_jax.models.families import CAUSAL_LM, family_of, functional_model
from lora_jax.models.gpt2.modeling import GPT2Config
from lora_jax.models.hf_names import params_from_tensors, tensors_from_params
from lora_jax.models.llama.config import LlamaConfig
from lora_jax.models.pooling import FAMILY
from lora_jax.models.roberta.modeling import RobertaConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

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
_VOCABULARY = {word: n for n, word in enumerate([*_SPECIAL, *_WORDS.split(), *".,!?'"])}
_NUM_BYTES = 257  # and the end of a text
_SIZES: Mapping[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = {
    **_SIZES,
    "intermediate_size": 64,
    "vocab_size": len(_VOCABULARY),
    "initializer_range": 0.2,
}

TINY_MODELS: Mapping[str, Any] = {
    "tiny-bert": BertConfig(**_ENCODER, max_position_embeddings=128),
    "tiny-roberta": RobertaConfig(
        **_ENCODER, max_position_embeddings=130, type_vocab_size=1, pad_token_id=0
    ),
    "tiny-gpt2": GPT2Config(
        vocab_size=_NUM_BYTES, n_embd=32, n_layer=2, n_head=4, n_positions=512, n_inner=64,
        initializer_range=0.2, bos_token_id=256, eos_token_id=256,
    ),
    "tiny-llama": LlamaConfig(
        **_SIZES, vocab_size=_NUM_BYTES, intermediate_size=64, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=512, initializer_range=0.2, bos_token_id=256, eos_token_id=256,
    ),
}  # fmt: skip


def make_tiny(name: str, request: Request) -> Checkpoint:
    """Returns the checkpoint; the same weights and words every time, on every machine."""
    config = TINY_MODELS[name]
    family = family_of(config)
    pooling = "mean" if name == "tiny-bert" else FAMILY
    is_decoder = family.kind == CAUSAL_LM
    shapes, _ = functional_model(config, None, pooling)
    params = _weights(shapes, config.initializer_range)
    entries = family.entries(config) + ([] if request.has_head else family.lm_head(config))
    # Through the names of a file and back, so that stacked layers have the same weights.
    tensors = tensors_from_params(params, entries)
    wanted = change_config(config, request.config_changes)
    shapes, _ = functional_model(wanted, None, pooling)
    entries = family.entries(wanted) + ([] if request.has_head else family.lm_head(wanted))
    placing = request.placing.of(family.aliases(wanted), [entry.path for entry in entries])
    params = params_from_tensors(tensors, entries, shapes, ignored=(), place=name, placing=placing)
    tokenizer = _byte_tokenizer() if is_decoder else _word_tokenizer()
    eos = (256,) if is_decoder else ()
    return Checkpoint(name, family, wanted, params, tokenizer, pooling, None, eos)


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


def _word_tokenizer() -> Tokenizer:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel(_VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(word, _VOCABULARY[word]) for word in ("[CLS]", "[SEP]")],
    )
    tokenizer.add_special_tokens(list(_SPECIAL))
    return tokenizer


def _byte_tokenizer() -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE({**vocabulary, "<|endoftext|>": 256}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True)])
    return tokenizer
