"""`generate_tokens`: token ids in, token ids out."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.core.values import is_adapted
from lora_jax.generate.beams import Rules
from lora_jax.generate.program import Data, Plan, decode
from lora_jax.generate.settings import NEVER, Decoding
from lora_jax.models.functional import flatten
from lora_jax.models.model import Model


class Generated(NamedTuple):
    """What was generated for B prompts: R = B * num_return rows, those of a prompt together.

    `tokens` (R, max_new_tokens) int32 are the new tokens alone, the one that ends a text included
    and padding after it; `lengths` (R,) int32 counts them without padding; `log_probs` (R,) is the
    sum of their log-probabilities under the model itself, before temperature or filters.
    """

    tokens: jax.Array
    lengths: jax.Array
    log_probs: jax.Array


def generate_tokens(
    model: Model,
    params: Any,
    input_ids: Any,
    attention_mask: Any = None,
    settings: Decoding | None = None,
    *,
    key: jax.Array | None = None,
    row_numbers: Any = None,
    use_cache: bool = True,
    **fields: Any,
) -> Generated:
    """Continues each prompt by up to `max_new_tokens` tokens; returns `Generated`.

    Args:
      model: a causal language model.
      params: the model's, plain, merged, or bound (`method.bind(trainable, frozen)`).
      input_ids: (B, T) integers.
      attention_mask: (B, T), 0 in the padding, which must be on the left.
      settings: how to decode; or the fields of a `Decoding` as keywords.
      key: what samples are drawn with.
      row_numbers: row r draws with the key folded with `row_numbers[r]` (by default r) and the
        step, so that neither its neighbours nor its padding change it.
      use_cache: False runs the model over the whole text at each step: slower, to compare with.

    One program is compiled for each shape and each num_beams, num_return, no_repeat_ngram_size, way
    of choosing and number of eos_token_ids. Widths are rounded up (`bucket_width`) by padding that
    nothing sees; all else is data, parameters included.

    The tokens are those of `transformers.generate` (5.x). As there, no_repeat_ngram_size counts the
    prompt and the caller's padding (unless no_repeat_in_prompt=False). Unlike there, what follows
    the end of a text that beams found is always `pad_token_id` (there it is the end itself if that
    id is 0).

    Raises:
      RequestError: a model without a language model's head, a prompt that is empty, all padding, or
        padded elsewhere than on the left, ids beyond the vocabulary, more tokens than a model with
        learned positions has, parameters with adapter dropout on, or no key to draw with.

    >>> from lora_jax.models import load_model
    >>> model = load_model("tiny-llama")
    >>> generate_tokens(model, model.params, [[1, 2], [3, 4]], max_new_tokens=4).tokens.shape
    (2, 4)
    """
    settings = _settings(settings, fields)
    arguments = _prepare(model, params, input_ids, attention_mask, settings, key, row_numbers)
    return Generated(*decode(params, arguments, plan=_plan(model, settings, use_cache)))


def compile_first(
    model: Model,
    params: Any,
    input_ids: Any,
    attention_mask: Any = None,
    settings: Decoding | None = None,
    *,
    key: jax.Array | None = None,
    use_cache: bool = True,
    **fields: Any,
) -> float:
    """Compiles what `generate_tokens` would run for these arguments; returns the seconds it took.

    The program is run as far as its first new token, so the seconds include the prompt.
    """
    settings = _settings(settings, fields)
    start = time.perf_counter()
    data = _prepare(model, params, input_ids, attention_mask, settings, key, None)
    data = data._replace(rules=data.rules._replace(limit=np.int32(0)))
    jax.block_until_ready(decode(params, data, plan=_plan(model, settings, use_cache)))
    return time.perf_counter() - start


def bucket_width(width: int) -> int:
    """The columns that a prompt of `width` tokens is padded to: at most a quarter more, or 15.

    >>> [bucket_width(n) for n in (1, 16, 17, 100, 200, 1000)]
    [16, 16, 32, 112, 224, 1024]
    """
    step = max(16, 2 ** (width.bit_length() - 3))
    return -(-width // step) * step


def _settings(settings: Decoding | None, fields: dict[str, Any]) -> Decoding:
    if settings is None:
        if "max_new_tokens" not in fields:
            raise RequestError("how long may the answer be? give max_new_tokens, such as 64")
        return Decoding(**fields)
    if fields:
        given = ", ".join(fields)
        raise RequestError(f"{given} given with settings; put it into the Decoding")
    return settings


def _plan(model: Model, settings: Decoding, use_cache: bool) -> Plan:
    return Plan(
        apply=model.apply,
        config=model.config,
        num_new=settings.max_new_tokens,
        num_beams=settings.num_beams,
        num_return=settings.num_return,
        repeat_size=settings.no_repeat_ngram_size,
        is_sampled=settings.do_sample,
        is_filtered=settings.top_k > 0 or settings.top_p < 1.0,
        use_cache=use_cache,
    )


def _prepare(model, params, input_ids, attention_mask, settings, key, row_numbers) -> Data:
    jax.eval_shape(lambda: model.make_cache(batch_size=1, length=1))  # or a RequestError
    _check_no_dropout(params)
    tokens_BP, mask_BP = _checked_prompts(input_ids, attention_mask, model.config.vocab_size)
    num_prompts, given = tokens_BP.shape
    width = _width(model, given, settings.max_new_tokens)
    extra = ((0, 0), (width - given, 0))
    num_rows = num_prompts * settings.num_return
    if settings.do_sample and not _is_key(key):
        found = "" if key is None else f", not {key!r}"
        raise RequestError(f"do_sample=True needs a key to draw with: key=jax.random.key(0){found}")
    row_R = np.arange(num_rows) if row_numbers is None else np.asarray(row_numbers)
    if row_R.shape != (num_rows,):
        raise RequestError(
            f"row_numbers have shape {row_R.shape}; there are {num_rows} rows: {num_prompts} "
            f"prompts, num_return={settings.num_return}"
        )
    pad = model.pad_token_id if settings.pad_token_id is None else settings.pad_token_id
    return Data(
        tokens_BP=jnp.asarray(np.pad(tokens_BP, extra), jnp.int32),
        mask_BP=jnp.asarray(np.pad(mask_BP, extra), jnp.int32),
        first=_int32(width - given if settings.no_repeat_in_prompt else width),
        pad=_int32(_in_vocabulary("pad_token_id", pad, model)),
        rules=_rules(model, settings),
        key=key if settings.do_sample else None,
        row_R=_int32(row_R),
        temperature=jnp.asarray(settings.temperature, jnp.float32),
        top_k=_int32(min(settings.top_k, model.config.vocab_size)),
        top_p=jnp.asarray(settings.top_p, jnp.float32),
    )


def _int32(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.int32)


def _is_key(key: Any) -> bool:
    """Whether it is one key of `jax.random.key`, or of the older `jax.random.PRNGKey`."""
    if not isinstance(key, jax.Array):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.ndim == 0
    return key.dtype == jnp.uint32 and key.ndim == 1


def _rules(model: Model, settings: Decoding) -> Rules:
    eos = model.eos_token_ids if settings.eos_token_ids is None else settings.eos_token_ids
    eos = [_in_vocabulary("eos_token_ids", token, model) for token in eos]
    if settings.num_beams > 1 and len(eos) >= model.config.vocab_size:
        raise RequestError("eos_token_ids hold the whole vocabulary; a search needs a token more")
    # No end at all is one that is no token: the program is that of one end.
    return Rules(
        eos_E=_int32(eos or [-1]),
        limit=_int32(settings.max_new_tokens),
        divisor_N=jnp.asarray(settings.divisors()),
        is_early=jnp.asarray(settings.early_stopping is True),
        is_never=jnp.asarray(settings.early_stopping == NEVER and settings.length_penalty > 0),
    )


def _check_no_dropout(params: Any) -> None:
    for leaf in jax.tree.leaves(params, is_leaf=is_adapted):
        if is_adapted(leaf) and leaf.is_random:
            raise RequestError(
                f"adapter dropout is on at {leaf.path!r}; bind without a key to generate"
            )


def _checked_prompts(input_ids: Any, attention_mask: Any, vocab_size: int):
    ids = np.asarray(input_ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise RequestError(f"input_ids are {ids.dtype} {ids.shape}; give integers (batch, time)")
    if not ids.size:
        raise RequestError(f"input_ids have shape {ids.shape}: there is no token to continue")
    mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
    if mask.shape != ids.shape:
        raise RequestError(f"attention_mask has shape {mask.shape}, input_ids have {ids.shape}")
    if not np.isin(mask, (0, 1)).all():
        raise RequestError("attention_mask must hold 1 for tokens and 0 for padding alone")
    for row, own in enumerate(mask.astype(np.int32)):
        if not own.any():
            raise RequestError(f"row {row} is all padding: there is no token to continue")
        if (np.diff(own) < 0).any():
            raise RequestError(
                f"row {row} has padding after its tokens; pad on the left, as "
                "lora_jax.generate.encode_prompts does"
            )
    real = ids[mask == 1]
    if real.min() < 0 or real.max() >= vocab_size:
        wrong = real[(real < 0) | (real >= vocab_size)][0]
        raise RequestError(f"token id {wrong} is none of the model's {vocab_size} tokens")
    return np.where((ids >= 0) & (ids < vocab_size), ids, 0), mask


def _width(model: Model, given: int, num_new: int) -> int:
    """How many columns the prompt gets: what is rounded up to must fit as well."""
    table = flatten(model.params).get("position/embedding")
    if table is None:
        return bucket_width(given)
    longest = table.shape[0]
    if given + num_new > longest:
        raise RequestError(
            f"a prompt of {given} tokens and max_new_tokens={num_new} need {given + num_new} "
            f"positions, the model has {longest}; shorten the prompt or ask for fewer tokens"
        )
    return max(given, min(bucket_width(given), longest - num_new))


def _in_vocabulary(name: str, token: int, model: Model) -> int:
    if not 0 <= token < model.config.vocab_size:
        raise RequestError(
            f"{name}: {token} is none of the model's {model.config.vocab_size} tokens"
        )
    return token
