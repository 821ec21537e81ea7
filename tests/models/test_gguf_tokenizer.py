"""The tokenizer in a GGUF file is the one the model was trained with."""

import random

import pytest

from lora_jax.io.gguf.reader import read_gguf
from lora_jax.models.gguf.tokenizer import gguf_chat_template, gguf_tokenizer
from tests.models.gguf_files import (
    TOKENS,
    needs_smollm2,
    refused,
    smollm2_path,
    tiny_llama,
)

ALPHABET = "aAzé ß½²٣Ⅷ中文🙂\u200d\u00a0\u0301 09,.'\n\t\r<|>$_-" + "\x00\x7f\ufffd"


def file_with(tmp_path, **changes):
    return read_gguf(tiny_llama(tmp_path / "a.gguf", **changes)[0])


def tokenizer_with(tmp_path, **changes):
    return gguf_tokenizer(file_with(tmp_path, **changes))


def random_texts(num_texts, *, alphabet=ALPHABET):
    rng = random.Random(0)
    for _ in range(num_texts):
        yield "".join(rng.choice(alphabet) for _ in range(rng.randrange(40)))


def pieces(tokenizer, text):
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "default", "llama-bpe"])
def test_text_comes_back(tmp_path, pre):
    tokenizer = tokenizer_with(tmp_path, **{"tokenizer.ggml.pre": pre})
    for text in random_texts(500):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_merges_and_bytes_have_the_file_s_ids(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    encoded = tokenizer.encode("hello hello é x")
    assert encoded.tokens == ["hello", "Ġhello", "Ġ", "Ã©", "Ġ", "x"]
    assert encoded.ids == [TOKENS.index(token) for token in encoded.tokens]


def test_special_tokens_are_special_and_unused_ones_are_not_there(tmp_path):
    tokenizer = tokenizer_with(tmp_path)
    ids = tokenizer.encode("<|im_start|>hello<tool><|im_end|>[PAD1]").ids
    assert ids[:4] == [1, TOKENS.index("hello"), TOKENS.index("<tool>"), 2]
    assert len(ids) == 4 + len("[PAD1]")
    assert tokenizer.decode(ids) == "hello<tool>[PAD1]"
    assert tokenizer.get_vocab_size() == len(TOKENS) - 1
    added = tokenizer.get_added_tokens_decoder()
    assert {i: t.special for i, t in added.items()} == {0: 1, 1: 1, 2: 1, len(TOKENS) - 2: 0}


def test_each_way_of_splitting_is_its_own(tmp_path):
    split = {
        name: pieces(
            tokenizer_with(tmp_path, **{"tokenizer.ggml.pre": name}), "It'S 12345, ok\n\n x"
        )
        for name in ("smollm", "gpt-2", "default", "llama-bpe", "qwen2")
    }
    digits = ["1", "2", "3", "4", "5"]
    assert split["smollm"] == ["It", "'", "S", "Ġ", *digits, ",", "Ġok", "ĊĊ", "Ġx"]
    assert split["gpt-2"] == ["It", "'", "S", "Ġ12345", ",", "Ġok", "ĊĊ", "Ġx"]
    assert split["default"] == ["It", "'", "S", "Ġ", "123", "45", ",", "Ġok", "ĊĊ", "Ġx"]
    assert split["llama-bpe"] == ["It", "'S", "Ġ", "123", "45", ",", "Ġok", "ĊĊ", "Ġx"]
    assert split["qwen2"] == ["It", "'S", "Ġ", *digits, ",", "Ġok", "ĊĊ", "Ġx"]


def test_a_piece_that_is_a_token_stays_whole_for_llama_3(tmp_path):
    def tokens(pre):
        return tokenizer_with(tmp_path, **{"tokenizer.ggml.pre": pre}).encode("unmerged").tokens

    assert tokens("llama-bpe")[1:] == ["unmerged"] and tokens("gpt-2") == list("unmerged")


def test_qwen_2_composes_characters(tmp_path):
    tokenizer = tokenizer_with(tmp_path, **{"tokenizer.ggml.pre": "qwen2"})
    assert tokenizer.encode("e\u0301").tokens == ["Ã©"]


def test_bos_and_eos_are_added_where_the_file_says(tmp_path):
    def ids(**changes):
        changes = {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
        return tokenizer_with(tmp_path, **changes).encode("x", "x").ids

    x = TOKENS.index("x")
    assert ids() == [x, x]
    assert ids(add_bos_token=True) == [1, x, 1, x]
    assert ids(add_bos_token=True, add_eos_token=True) == [1, x, 2, 1, x, 2]
    assert ids(add_eos_token=True) == [x, 2, x, 2]
    # llama.cpp's default for this one, as in Llama 3's own tokenizer.json.
    assert ids(pre="llama-bpe") == [1, x, 1, x]
    assert ids(pre="llama-bpe", add_bos_token=False) == [x, x]


def test_the_chat_template_is_there_or_none(tmp_path):
    assert gguf_chat_template(file_with(tmp_path)) is None
    template = "{% for m in messages %}\n{{ m }}{% endfor %}"
    file = file_with(tmp_path, **{"tokenizer.chat_template": template})
    assert gguf_chat_template(file) == template
    refused(
        "chat_template is 3",
        gguf_chat_template,
        file_with(tmp_path, **{"tokenizer.chat_template": 3}),
    )


WRONG = [
    ("model", "llama", "only 'gpt2', byte-level BPE"),
    ("model", None, "lacks the metadata tokenizer.ggml.model"),
    ("pre", "tekken", "known are default, gpt-2, smollm, llama-bpe, qwen2"),
    ("pre", None, "lacks the metadata tokenizer.ggml.pre"),
    ("tokens", None, "lacks the metadata tokenizer.ggml.tokens"),
    ("tokens", [1, 2], "must be a list of strings"),
    ("tokens", ["x"] * len(TOKENS), f"'x': {len(TOKENS) - 1} times"),
    ("tokens", TOKENS[:-1], "token_type .* one for each of"),
    ("token_type", None, "lacks the metadata tokenizer.ggml.token_type"),
    ("token_type", ["a"], "must be a list of integers"),
    ("merges", None, "lacks the metadata tokenizer.ggml.merges"),
    ("merges", ["ab"], "unlike 'ab'"),
    ("merges", ["a b c"], "unlike 'a b c'"),
    ("merges", ["a nothing"], "holds no usable tokenizer"),
    ("add_bos_token", 1, "must be true or false"),
    ("add_space_prefix", True, "must be false"),
]


@pytest.mark.parametrize(("key", "value", "match"), WRONG, ids=[w[2] for w in WRONG])
def test_what_is_wrong_with_a_tokenizer_is_named(tmp_path, key, value, match):
    file = file_with(tmp_path, **{f"tokenizer.ggml.{key}": value})
    assert str(file.path) in refused(match, gguf_tokenizer, file)


def test_a_bos_that_is_no_token_is_named(tmp_path):
    changes = {"add_bos_token": True, "bos_token_id": 99999}
    file = file_with(tmp_path, **{f"tokenizer.ggml.{key}": v for key, v in changes.items()})
    refused("bos_token_id is 99999", gguf_tokenizer, file)
    changes = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}
    refused("lacks .*bos_token_id", gguf_tokenizer, file_with(tmp_path, **changes))


@needs_smollm2
def test_smollm2_s_ids_are_those_of_llama_cpp():
    file = read_gguf(smollm2_path())
    tokenizer = gguf_tokenizer(file)
    assert tokenizer.get_vocab_size() == 49152
    special = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert {token: tokenizer.token_to_id(token) for token in special} == special
    # Published outputs of llama.cpp's llama-tokenize and of the model's own tokenizer.
    assert tokenizer.encode("hello world").ids == [28120, 905]
    assert tokenizer.encode('" and "hello world"').ids == [18, 284, 476, 28120, 905, 18]
    prompt = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
        "<|im_end|>\n<|im_start|>user\nhello world<|im_end|>\n<|im_start|>assistant\n"
    )
    system = [9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411]
    system += [407, 19712, 8182]
    chat = [1, *system, 2, 198, 1, 4093, 198, 28120, 905, 2, 198, 1, 520, 9531, 198]
    assert tokenizer.encode(prompt).ids == chat
    assert "<|im_start|>assistant" in gguf_chat_template(file)
    # Its vocabulary lacks 21 single bytes, of control characters and unassigned planes.
    for text in random_texts(500, alphabet=ALPHABET.replace("\x00", "")):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
