"""Regular expressions that somebody else may have written: matched within a time limit.

Python's `re` backtracks without limit, and `(.|[a-z])*X` on a module's name takes longer than
anybody waits. The `regex` package matches the same expressions and takes a timeout. Importing this
module makes the rules of `lora_jax.core.rules` match by it.
"""

from __future__ import annotations

import functools
import re
import reprlib
import time

from lora_jax.core import patterns
from lora_jax.core.errors import RequestError

SECONDS = 2.0  # of one expression, over all the names it is matched against
# What `regex` would read as its own (fuzzy matching: "a{e<=1}") is a literal brace in Python's.
_ESCAPED_OR_BRACE = re.compile(r"(\\.)|\{(?!\d+(?:,\d*)?\}|,\d*\})", re.DOTALL)


class Expression:
    """A compiled expression with the time that it has left; `pattern` is its text."""

    def __init__(self, pattern: str):
        plain = re.compile(pattern)  # Python's syntax decides what is an expression
        self.pattern = pattern
        self._left = SECONDS
        try:
            import regex
        except ModuleNotFoundError:
            # It comes with the extra `text`, without which no stranger's adapter can be read.
            self._compiled, self._limit = plain, False
            return
        text = _ESCAPED_OR_BRACE.sub(lambda found: found[1] or r"\{", pattern)
        try:
            self._compiled = regex.compile(text)
        except regex.error as error:
            raise re.error(str(error)) from error
        self._limit = True

    def match(self, text: str):
        return self._within_time(self._compiled.match, text)

    def fullmatch(self, text: str):
        return self._within_time(self._compiled.fullmatch, text)

    def _within_time(self, method, text: str):
        started = time.process_time()
        try:
            if self._left <= 0:
                raise TimeoutError
            return method(text, timeout=self._left) if self._limit else method(text)
        except (TimeoutError, MemoryError, RecursionError) as error:
            self._left = 0.0
            raise RequestError(
                f"the regular expression {reprlib.repr(self.pattern)} takes more than "
                f"{SECONDS:g} s to match names such as {reprlib.repr(text)}; "
                "write the names as a list, or an expression with fewer repetitions"
            ) from error
        finally:
            # Ordinary matches take microseconds, and a long process makes many of them.
            if (spent := time.process_time() - started) > 1e-3:
                self._left -= spent


@functools.lru_cache(maxsize=4096)
def compile(pattern: str) -> Expression:
    """The expression, which keeps its remaining time between uses.

    Raises:
      re.error, OverflowError, RecursionError: `pattern` is no regular expression of Python's.
    """
    return Expression(pattern)


patterns.match_with(compile)
