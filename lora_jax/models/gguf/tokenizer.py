"""The byte-level BPE tokenizer that lies in a GGUF file, rebuilt as a `tokenizers.Tokenizer`."""

import collections
import dataclasses
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing

from lora_jax.io.gguf.reader import GgufFile
from lora_jax.models.tokenizer import tokenizer_errors

_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


def _split(pattern: str) -> pre.PreTokenizer:
    return pre.Split(Regex(pattern), "isolated")


_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT_2_SPLIT = pre.ByteLevel(add_prefix_space=False, use_regex=True)
_ONLY_BYTES = pre.ByteLevel(add_prefix_space=False, use_regex=False)


@dataclasses.dataclass(frozen=True)
class _Recipe:
    """How a tokenizer splits text before it merges: what GGUF tells by a name alone."""

    steps: tuple[pre.PreTokenizer, ...]
    # Whether a piece that is a token stays whole, whatever the merges say.
    ignores_merges: bool = False
    # Whether a text starts with BOS where the file does not say.
    adds_bos: bool = False
    is_nfc: bool = False


_RECIPES = {
    # What llama.cpp does with files whose converter did not recognise the tokenizer.
    "default": _Recipe(
        (
            _split(r"[\p{P}\$\+<=>\^~\|]+"),
            _split(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"),
            _split(r"\p{N}+"),
            _split(r"[0-9][0-9][0-9]"),
            _ONLY_BYTES,
        )
    ),
    "gpt-2": _Recipe((_GPT_2_SPLIT,)),
    "smollm": _Recipe((pre.Digits(individual_digits=True), _GPT_2_SPLIT)),
    "llama-bpe": _Recipe((_split(_LLAMA_3), _ONLY_BYTES), ignores_merges=True, adds_bos=True),
    "qwen2": _Recipe((_split(_QWEN_2), _ONLY_BYTES), is_nfc=True),
}


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """Returns the tokenizer of a file whose `tokenizer.ggml.model` is "gpt2": byte-level BPE.

    Control tokens are special added tokens, user-defined ones are added tokens; unused places of
    the vocabulary are left out. BOS and EOS are added to a text where the file says so. Raises
    `RequestError` if metadata is missing or inconsistent, and for another kind of tokenizer or way
    of splitting, by name.
    """
    kind = file.text("tokenizer.ggml.model")
    if kind != "gpt2":
        reason = "and only 'gpt2', byte-level BPE, is read; give the model's tokenizer.json"
        raise file.refusal("tokenizer.ggml.model", reason)
    recipe = _recipe(file)
    tokens = file.texts("tokenizer.ggml.tokens")
    types = file.integers("tokenizer.ggml.token_type")
    if len(types) != len(tokens):
        raise file.error("tokenizer.ggml.token_type", f"one for each of {len(tokens)} tokens")
    vocabulary = {t: i for i, t in enumerate(tokens) if types[i] != _UNUSED}
    if len(vocabulary) < len(tokens) - types.count(_UNUSED):
        used = collections.Counter(t for i, t in enumerate(tokens) if types[i] != _UNUSED)
        token, count = used.most_common(1)[0]
        raise file.error("tokenizer.ggml.tokens", f"free of repetition ({token!r}: {count} times)")
    merges = [_pair(file, merge) for merge in file.texts("tokenizer.ggml.merges")]
    added = [
        AddedToken(tokens[i], normalized=False, special=kind == _CONTROL)
        for i, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]
    with tokenizer_errors(
        f"{file.path} holds no usable tokenizer", "give the model's tokenizer.json"
    ):
        bpe = models.BPE(vocabulary, merges, ignore_merges=recipe.ignores_merges)
        tokenizer = Tokenizer(bpe)
        tokenizer.add_tokens(added)
        _add_steps(tokenizer, recipe, *_ends(file, recipe, tokens))
    return tokenizer


def gguf_chat_template(file: GgufFile) -> str | None:
    """Returns the Jinja template that makes a prompt of a conversation; None if there is none."""
    return file.text("tokenizer.chat_template", None)


def _recipe(file: GgufFile) -> _Recipe:
    key = "tokenizer.ggml.pre"
    name = file.text(key)
    if name not in _RECIPES:
        known = ", ".join(_RECIPES)
        reason = f"and the ways of splitting known are {known}; give the model's tokenizer.json"
        raise file.refusal(key, reason)
    if file.flag("tokenizer.ggml.add_space_prefix", False):
        raise file.error("tokenizer.ggml.add_space_prefix", "false for byte-level BPE")
    return _RECIPES[name]


def _pair(file: GgufFile, merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise file.error("tokenizer.ggml.merges", f"pairs with a space between, unlike {merge!r}")
    return left, right


def _ends(
    file: GgufFile, recipe: _Recipe, tokens: Sequence[str]
) -> tuple[tuple[str, int] | None, ...]:
    """Returns the tokens (text, id) that each text starts and ends with; None for none."""
    ends = []
    for name, default in (("bos", recipe.adds_bos), ("eos", False)):
        if not file.flag(f"tokenizer.ggml.add_{name}_token", default):
            ends.append(None)
            continue
        key = f"tokenizer.ggml.{name}_token_id"
        token_id = file.integer(key)
        if token_id >= len(tokens):
            raise file.error(key, f"below the number of tokens, {len(tokens)}")
        ends.append((tokens[token_id], token_id))
    return tuple(ends)


def _add_steps(
    tokenizer: Tokenizer,
    recipe: _Recipe,
    bos: tuple[str, int] | None,
    eos: tuple[str, int] | None,
) -> None:
    if recipe.is_nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre.Sequence(list(recipe.steps))
    tokenizer.decoder = decoders.ByteLevel()
    ends = [end for end in (bos, eos) if end is not None]
    if ends:
        start, stop = ([end[0]] if end else [] for end in (bos, eos))
        pair = [f"{piece}:1" for piece in [*start, "$B", *stop]]
        tokenizer.post_processor = TemplateProcessing(
            single=[*start, "$A", *stop], pair=[*start, "$A", *stop, *pair], special_tokens=ends
        )
