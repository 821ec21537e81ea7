"""huggingface_hub as this project uses it: quiet, and with errors of one line."""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterator

from lora_jax.core.errors import RequestError

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)

# Types of httpx and of requests: huggingface_hub has changed from one to the other.
_NO_ANSWER = {
    "ConnectError", "ConnectionRefusedError", "NewConnectionError", "Timeout", "TimeoutException",
    "gaierror",
}  # fmt: skip
_BROKEN = {"ChunkedEncodingError", "ConnectionError", "NetworkError", "ProtocolError"}

# What to do about an answer, by its status.
_ANSWERS = {
    401: f"the hub does not accept your token; {LOG_IN}",
    402: "the hub asks for a payment; see the account's billing page",
    403: "your token has no right to do that; use one with write access, or a repository of yours",
    404: "there is nothing of that name, or it is private and your token does not reach it",
    409: "it conflicts with what is there; look at the repository, then try again",
    412: "somebody else pushed at the same time; push again",
    413: "the hub finds it too large",
    429: "the hub has had too many requests from you; wait, then try again",
}


def check_repo(repo: str) -> None:
    """Raises `RequestError` for what is no "owner/name"."""
    if not isinstance(repo, str) or not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise RequestError(f"{repo!r} is no repository of the hub; give it as owner/name")


def check_logged_in() -> None:
    """Raises `RequestError` without a token, before the long work."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise RequestError(f"pushing needs a token of the Hugging Face hub: {LOG_IN}")


@contextlib.contextmanager
def talking(doing: str) -> Iterator[None]:
    """Quiet while huggingface_hub works; what goes wrong is a `RequestError` of one line.

    Args:
      doing: what is being done, to begin the line with, such as "push to owner/name".
    """
    with _quiet():
        try:
            yield
        except RequestError:
            raise
        # The types raised differ by version, by transport and by Python's own socket errors.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK:
                raise
            raise RequestError(f"cannot {doing}: {_reason(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without log lines of every retry; with progress bars only where somebody watches."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
        logging,
    )

    level, hide = logging.get_verbosity(), not sys.stderr.isatty()
    hide = hide and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if hide:
            enable_progress_bars()


def _reason(error: BaseException) -> str:
    """What happened and what to do, in one line."""
    causes = list(_causes(error))
    names = {kind.__name__ for one in causes for kind in type(one).__mro__}
    responses = [getattr(one, "response", None) for one in causes]
    status = next((one.status_code for one in responses if one is not None), None)
    if "OfflineModeIsEnabled" in names:
        return "HF_HUB_OFFLINE is set; unset it"
    if "RevisionNotFoundError" in names:
        return "the repository has no such revision; see its branches and tags on the hub"
    if "GatedRepoError" in names:
        return f"the repository is gated; ask for access on its page, then {LOG_IN}"
    if "RepositoryNotFoundError" in names:
        return f"there is no such repository, or it is private and not yours to see; {LOG_IN}"
    if status is not None:
        said = _said(causes) if status != 400 else _first_line(error)
        return f"{_answer(status)} (status {status}{said and f': {said}'})"
    if names & _NO_ANSWER:
        return f"the hub does not answer ({_first_line(causes[-1])}); try again when it does"
    if names & _BROKEN:
        return f"the connection broke ({_first_line(causes[-1])}); try again"
    # huggingface_hub wraps what its threads raise.
    return _first_line(next((one for one in causes if not isinstance(one, RuntimeError)), error))


def _answer(status: int) -> str:
    if status >= 500:
        return "the hub failed; try again later"
    return _ANSWERS.get(status, "the hub refused it")


def _said(causes: list[BaseException]) -> str:
    """The server's own words, where it has any."""
    said = next((s for one in causes if (s := getattr(one, "server_message", None))), "")
    return " ".join(str(said).split())[:300]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, as far as ten."""
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__ or error.__context__


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
