"""Every family against transformers: logits, hidden states, gradients (make_family_fixtures.py)."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.io.safetensors import read_tensors
from lora_jax.models import load_model
from lora_jax.models.functional import flatten, unflatten

FAMILIES = Path(__file__).resolve().parent.parent / "fixtures" / "families"
NAMES = sorted(path.name.removesuffix("_states.safetensors") for path in FAMILIES.glob("*_states*"))
DECODERS = [name for name in NAMES if not name.startswith(("bert", "roberta"))]
LANGUAGE_MODELS = [name for name in DECODERS if "classifier" not in name]
BARE_ENCODERS = ["bert", "roberta"]
# A program each to compile: the others stacked are slow tests.
FAST_STACKED = {"gpt2", "llama_gqa_tied", "mistral_window"}
TOLERANCE = 5e-5


@functools.cache
def expected(name):
    return read_tensors(FAMILIES / f"{name}_states.safetensors")


@functools.cache
def load(name, **options):
    head = None
    if name.endswith(("classifier", "regression")):
        head = "regression" if name.endswith("regression") else "classification"
    return load_model(FAMILIES / name, head=head, tokenizer=False, **options)


def inputs_of(name):
    return {key: expected(name)[key] for key in ("input_ids", "attention_mask")}


def at_real_positions(name, array):
    """(positions, …) of (B, T, …); what is one row a text stays as it is."""
    mask = expected(name)["attention_mask"] == 1
    return array[mask] if array.shape[:2] == mask.shape else array


def compiled(function):
    """`jax.jit` without the compiler's optimisations: the programs are many, and run once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


@functools.cache
def computed(name, *, gradients=True, **options):
    """What the fixture holds, computed here: one compilation for all of it."""
    model = load(name, **options)
    inputs = inputs_of(name)
    real = functools.partial(at_real_positions, name)

    def forward(params):
        output, states = model.apply(params, **inputs, output_hidden_states=True)
        return real(output), jnp.stack([real(h) for h in states])

    def projection(some, rest):
        scores, states = forward(unflatten({**rest, **some}))
        wave = np.cos(1.7 * np.arange(scores.size)).astype(np.float32)
        return (scores.reshape(-1) * wave).sum() / scores.size**0.5, (scores, states)

    named = [key.removeprefix("gradient.") for key in expected(name) if key.startswith("gradient.")]
    if not named or not gradients:
        logits, states = compiled(forward)(model.params)
        return {"logits": logits, "states": states}
    entries = entries_of(model, named)
    flat = flatten(model.params)
    some = {path: flat[path] for path in {entry.path for entry in entries.values()}}
    gradient, (logits, states) = compiled(jax.grad(projection, has_aux=True))(some, flat)
    found = {"logits": logits, "states": states}
    for tensor, entry in entries.items():
        array = gradient[entry.path] if entry.index is None else gradient[entry.path][entry.index]
        found[f"gradient.{tensor}"] = array.T if entry.is_transposed else array
    return found


def entries_of(model, named):
    """`{name in the file: its entry}`."""
    family = model.family
    entries = [*family.entries(model.config), *family.lm_head(model.config)]
    entries = {e.tensor: e for e in [*entries, *family.pooler, *family.classifier]}
    return {there: entries[here] for here, there in family.names(named).items()}


def assert_as_transformers(name, found):
    wanted = {k: x for k, x in expected(name).items() if k in found}
    assert len(wanted) >= len(found) - ("logits" not in expected(name))
    for key, array in wanted.items():
        ours = np.array(found[key])
        if key.endswith("word_embeddings.weight"):
            # torch gives the padding's own row no gradient (`padding_idx`); here it has one.
            pad = load(name).config.pad_token_id
            ours[pad], array = 0.0, np.where(np.arange(len(array))[:, None] == pad, 0.0, array)
        np.testing.assert_allclose(ours, array, rtol=0, atol=TOLERANCE, err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_logits_states_and_gradients_equal_transformers(name):
    assert_as_transformers(name, computed(name))


@pytest.mark.parametrize(
    "name",
    [n if n in FAST_STACKED else pytest.param(n, marks=pytest.mark.slow) for n in DECODERS],
)
def test_stacked_layers_equal_transformers_and_have_the_same_hash(name):
    # Of the stacked, one folder's gradients are enough: they take longest to compile.
    found = computed(name, scan_layers=True, gradients=name == "gpt2")
    assert_as_transformers(name, found)
    for key, array in found.items():
        np.testing.assert_allclose(array, computed(name)[key], rtol=0, atol=1e-5, err_msg=key)
    assert load(name, scan_layers=True).base_hash == load(name).base_hash


def test_one_folder_of_each_family_has_gradients():
    with_gradients = {
        load(name).config.__class__.__name__
        for name in NAMES
        if any(key.startswith("gradient.") for key in expected(name))
    }
    assert with_gradients == {"BertConfig", "RobertaConfig", "GPT2Config", "LlamaConfig"}


@pytest.mark.parametrize("name", BARE_ENCODERS)
def test_without_a_head_the_output_is_the_last_hidden_state(name):
    found = computed(name)
    np.testing.assert_array_equal(found["logits"], found["states"][-1])


def test_a_new_head_on_bert_stands_on_its_own_pooler():
    name = "bert"
    model = load_model(FAMILIES / name, head="classification", num_labels=5, tokenizer=False)
    assert (model.pooling, model.head_is_new) == ("family", True)
    head = model.params["head"]
    wanted = expected(name)["pooled"] @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    logits = compiled(model.apply)(model.params, **inputs_of(name))
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=TOLERANCE)


def test_weights_in_several_files_are_those_of_one():
    shards = list((FAMILIES / "llama_sharded").glob("*.safetensors"))
    assert len(shards) > 2 and not (FAMILIES / "llama_sharded" / "model.safetensors").exists()
    whole, sharded = load("llama").params, load("llama_sharded").params
    assert jax.tree.structure(whole) == jax.tree.structure(sharded)
    jax.tree.map(np.testing.assert_array_equal, whole, sharded)


@pytest.mark.parametrize(
    "name", ["mistral_window", "gpt2", "bert_classifier", "roberta_classifier"]
)
def test_bfloat16_differs_by_its_rounding_alone(name):
    model = load(name, dtype="bfloat16")
    head = {p for p in flatten(model.params) if p.startswith("head/")}
    dtypes = {p: str(x.dtype) for p, x in flatten(model.params).items()}
    assert {d for p, d in dtypes.items() if p not in head or not model.head} == {"bfloat16"}
    output = compiled(model.apply)(model.params, **inputs_of(name))
    assert output.dtype == jnp.float32
    logits, wanted = at_real_positions(name, np.asarray(output)), expected(name)["logits"]
    assert np.isfinite(output).all()
    assert np.sqrt(np.mean((logits - wanted) ** 2)) < 5e-2 * wanted.std()
    assert np.abs(logits - wanted).max() > 1e-4, "computed in float32 after all"


@pytest.mark.parametrize("name", ["mistral_window", "gpt2", "bert_classifier", "roberta"])
def test_softmax_norms_and_rotations_of_a_bfloat16_model_are_float32(name):
    model = load(name, dtype="bfloat16")
    jaxpr = jax.make_jaxpr(lambda p: model.apply(p, **inputs_of(name)))(model.params)
    wide = {"exp": 0, "rsqrt": 0, "cos": 0, "sin": 0, "reduce_max": 0}
    for equation in equations(jaxpr.jaxpr):
        if equation.primitive.name in wide:
            wide[equation.primitive.name] += 1
            assert {v.aval.dtype for v in equation.invars} == {np.dtype(np.float32)}, equation
    num_layers = model.config.num_hidden_layers
    assert wide["exp"] == wide["reduce_max"] == num_layers
    assert wide["rsqrt"] == 2 * num_layers + 1
    assert wide["cos"] == wide["sin"] == (2 * num_layers if "mistral" in name else 0)


def equations(jaxpr):
    """Those of a jaxpr and of the jaxprs inside it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama_rope_llama3", {"scan_layers": True}),
        ("mistral_window", {}),
        ("mistral_window", {"scan_layers": True}),
        ("gpt2", {}),
        ("gpt2", {"scan_layers": True}),
    ],
)
def test_decoding_in_pieces_with_a_cache_equals_the_whole_at_once(name, options):
    model = load(name, **options)
    ids, mask = inputs_of(name).values()
    # Room to spare: columns that are not filled yet must not be seen.
    cache = model.make_cache(batch_size=len(ids), length=ids.shape[1] + 3)
    step = compiled(lambda params, ids, mask, cache: model.apply(params, ids, mask, cache=cache))
    pieces = []
    for start, stop in [(0, 5), *((n, n + 1) for n in range(5, ids.shape[1]))]:
        logits, cache = step(model.params, ids[:, start:stop], mask[:, start:stop], cache)
        pieces.append(logits)
    assert int(cache.length) == ids.shape[1]
    logits = at_real_positions(name, np.concatenate(pieces, axis=1))
    np.testing.assert_allclose(logits, computed(name)["logits"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits, expected(name)["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_folder_says_what_it_is(name):
    raw = json.loads((FAMILIES / name / "config.json").read_text())
    model = load(name)
    assert (model.kind, model.head, model.num_labels) == ("causal-lm", None, None)
    assert model.config.tie_word_embeddings == raw["tie_word_embeddings"]
    assert model.config.tie_word_embeddings != ("head" in model.params)
    assert model.eos_token_ids == (() if name == "qwen2" else (2,))
