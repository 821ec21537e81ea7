"""The families as functions: what they mean, and how large the published ones are."""

import math
import re

import jax
import numpy as np
import pytest

import lora_jax as lj
from lora_jax.core.errors import RequestError
from lora_jax.core.rules import Part
from lora_jax.models import load_model
from lora_jax.models.families import FAMILIES
from lora_jax.models.functional import flatten, unflatten
from lora_jax.models.gpt2.modeling import GPT2Config
from lora_jax.models.llama.config import LlamaConfig
from lora_jax.models.roberta.modeling import RobertaConfig
from tests.models.folders import FIXTURES, IDS, assert_same_params, load, logits_of, shapes_of

# The functions


def test_an_untied_head_gives_the_same_logits_and_is_a_parameter_of_its_own():
    for name in ("gpt2", "qwen2"):
        tied, untied = load(FIXTURES / name), load(FIXTURES / name, untie=True)
        assert "head" not in tied.params and untied.params["head"]["kernel"].shape == (16, 64)
        assert not untied.config.tie_word_embeddings
        np.testing.assert_allclose(logits_of(untied), logits_of(tied), rtol=0, atol=1e-5)
    already = load(FIXTURES / "gpt2_untied", untie=True)
    assert_same_params(already, load(FIXTURES / "gpt2_untied"))


@pytest.mark.parametrize("name", ["gpt2", "llama_gqa_tied"])
def test_left_padding_changes_nothing_where_positions_count_the_real_tokens(name):
    model = load(FIXTURES / name)
    whole = logits_of(model)
    padded = np.pad(IDS, ((0, 0), (3, 0)), constant_values=1)
    mask = (np.arange(9) >= 3).astype(np.int32)[None].repeat(2, 0)
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0)
    logits = jax.jit(model.apply)(model.params, padded, mask, position_ids=positions)
    np.testing.assert_allclose(logits[:, 3:], whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("bert", {"scan_layers": True}, "scan_layers is not for Bert models"),
        ("roberta", {"untie": True}, "untie is for decoders"),
        ("llama", {"head": "lm"}, "head is 'lm'"),
    ],
)
def test_options_of_other_families_are_refused(name, arguments, match):
    with pytest.raises(RequestError, match=match):
        load(FIXTURES / name, **arguments)


def test_inputs_that_do_not_fit_are_refused():
    model = load(FIXTURES / "gpt2")
    for inputs, match in (
        ((np.ones((1, 21), int),), "21 tokens is longer than the model's 20 positions"),
        ((np.ones(4, int),), r"int64 \(4,\)|int32 \(4,\)"),
        ((np.ones((1, 4)),), "takes integers"),
        ((np.ones((1, 4), int), np.ones((1, 3), int)), r"attention_mask has shape \(1, 3\)"),
    ):
        with pytest.raises(RequestError, match=match):
            model.apply(model.params, *inputs)
    cache = model.make_cache(batch_size=3, length=8)
    with pytest.raises(RequestError, match="the cache is for 3 rows"):
        model.apply(model.params, IDS, cache=cache)
    with pytest.raises(RequestError, match="30 tokens is longer"):
        model.apply(model.params, IDS, cache=model.make_cache(batch_size=2, length=30))
    with pytest.raises(RequestError, match="is no language model"):
        load(FIXTURES / "bert").make_cache(batch_size=1, length=8)
    with pytest.raises(RequestError, match="loaded without a tokenizer"):
        _ = model.tokenizer


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-roberta", "tiny-gpt2", "tiny-llama"])
def test_every_alias_names_parameters_and_all_linear_the_kernels_of_the_layers(name):
    for scan_layers in (False, True) if name in ("tiny-gpt2", "tiny-llama") else (False,):
        model = load_model(name, scan_layers=scan_layers, **_for_a_head(name))
        paths = flatten(model.params)
        for alias, value in model.aliases.items():
            pattern = value.pattern if isinstance(value, Part) else value
            found = [path for path in paths if re.fullmatch(pattern, path)]
            layers = 1 if scan_layers else model.config.num_hidden_layers
            if alias in ("embed", "head"):
                assert found or (alias, name) == ("head", "tiny-gpt2"), alias
            elif alias != "all-linear":
                assert len(found) == layers, (alias, found)
        kernels = [p for p in paths if p.endswith("/kernel") and "layers" in p]
        everything = model.aliases["all-linear"]
        assert [p for p in paths if re.fullmatch(everything, p)] == kernels


def _for_a_head(name):
    is_encoder = name in ("tiny-bert", "tiny-roberta")
    return {"head": "classification", "num_labels": 2} if is_encoder else {}


# Sizes, from shapes alone


def count(shapes):
    return sum(math.prod(x.shape) for x in shapes.values())


def gpt2_config(num_layers, width, num_heads, **options):
    return GPT2Config(
        vocab_size=50257,
        n_embd=width,
        n_layer=num_layers,
        n_head=num_heads,
        n_positions=1024,
        n_inner=4 * width,
        **options,
    )


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize(
    ("sizes", "num_params", "num_lora"),
    # The paper's tables (arXiv:2106.09685, Table 3): 354.92M and 774.03M, LoRA 0.35M and 0.77M.
    [((24, 1024, 16), 354_823_168, 393_216), ((36, 1280, 20), 774_030_080, 737_280)],
    ids=["medium", "large"],
)
def test_gpt2_and_its_adapters_have_the_published_sizes(sizes, num_params, num_lora, scan_layers):
    config = gpt2_config(*sizes, scan_layers=scan_layers)
    shapes, apply = shapes_of(config)
    assert count(shapes) == num_params
    params = unflatten(shapes)
    axes = lj.kernel_axes(apply, params, jax.ShapeDtypeStruct((1, 2), "int32"))
    aliases = FAMILIES["gpt2"].aliases(config)
    table = lj.LoRA(targets="q,v", rank=4, aliases=aliases, axes=axes).table(params)
    num_layers, width, _ = sizes
    assert table.num_trainable == num_lora == 2 * num_layers * 2 * width * 4
    assert table.num_params == num_params


def test_roberta_base_has_the_published_size():
    config = RobertaConfig(
        vocab_size=50265,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        max_position_embeddings=514,
        type_vocab_size=1,
    )
    shapes, _ = shapes_of(config)
    assert count(shapes) == 124_055_040  # 124,645,632 with the pooler that its heads do not use
    shapes, _ = shapes_of(config, num_labels=2)
    assert count(shapes) == 124_647_170
    lora = lj.LoRA(targets="q,v", rank=8, aliases=FAMILIES["roberta"].aliases(config))
    assert lora.table(unflatten(shapes)).num_trainable == 2 * 12 * 2 * 768 * 8


def test_smollm2_135m_has_the_published_size():
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        scan_layers=True,
    )
    assert count(shapes_of(config)[0]) == 134_515_008
