"""A folder's `tokenizer.json`, checked against the model that is to read its ids."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_jax.core.errors import RequestError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PAD_NAMES = ("[PAD]", "<pad>")


@contextlib.contextmanager
def tokenizer_errors(what: str, way_out: str) -> Iterator[None]:
    """Raises `RequestError` for what the tokenizers library raises: `{what}: …; {way_out}`.

    That is a bare `Exception` for whatever is wrong, and panics of Rust, which are not even that.
    """
    try:
        yield
    except RequestError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise RequestError(f"{what}: {error}; {way_out}") from error


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Drops what is written to the process's stderr from outside of Python."""
    with open(os.devnull, "w") as nowhere:
        saved = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)


def encoding_errors() -> contextlib.AbstractContextManager[None]:
    """`tokenizer_errors` of a text that cannot be encoded, since the file contradicts itself."""
    return tokenizer_errors(
        "the tokenizer cannot encode the texts", "restore the model's tokenizer.json"
    )


def read_tokenizer(
    path: str | os.PathLike, *, vocab_size: int, pad_token_id: int | None
) -> Tokenizer:
    """Returns the tokenizer with its own truncation and padding switched off.

    Raises `RequestError` if the file is missing or unreadable, or its vocabulary cannot be that of
    a model with `vocab_size` embedding rows and this padding id (None: not looked at).
    """
    from tokenizers import Tokenizer

    path = Path(path)
    with tokenizer_errors(f"{path} is not a readable tokenizer", "restore it"):
        tokenizer = Tokenizer.from_file(str(path))
        # A file that contradicts itself is found here: Rust panics, and writes that to stderr.
        with _quiet_stderr():
            tokenizer.encode("a")
            tokenizer.encode("a", "b")
    check_tokenizer(tokenizer, vocab_size=vocab_size, pad_token_id=pad_token_id, place=str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_tokenizer(
    tokenizer: Tokenizer, *, vocab_size: int, pad_token_id: int | None, place: str
) -> None:
    """Raises `RequestError` if the tokenizer cannot be the one the model was trained with."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    advice = "put the model's own tokenizer.json there"
    if not vocabulary:
        raise RequestError(f"{place} has an empty vocabulary; {advice}")
    token, last = max(vocabulary.items(), key=lambda item: item[1])
    if last >= vocab_size:
        raise RequestError(
            f"{place} is the tokenizer of another model: token {token!r} has id {last}, the model "
            f"has {vocab_size} embedding rows; {advice}"
        )
    # Embedding tables are padded to round sizes, by 905 rows in the widest case known (Phi-2).
    unused = vocab_size - len(vocabulary)
    if unused > max(1024, vocab_size // 50):
        raise RequestError(
            f"{place} is the tokenizer of another model: it has {len(vocabulary)} tokens, the "
            f"model {vocab_size} embedding rows; {advice}"
        )
    if pad_token_id is None:
        return
    padding = tokenizer.id_to_token(pad_token_id)
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    # Some models name another special token than their tokenizer's padding; a plain word is wrong.
    if padding not in special and padding not in _PAD_NAMES:
        raise RequestError(
            f"{place} is the tokenizer of another model: the model's padding id {pad_token_id} is "
            f"the token {padding!r} there; {advice}"
        )
