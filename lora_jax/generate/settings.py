"""`Decoding`: how text is generated, checked before anything is compiled."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from lora_jax.core.errors import RequestError
from lora_jax.settings.fields import Setting, check_range, setting, setting_of

NEVER = "never"
MOST = 2**20
# Below it logits overflow float32.
LOWEST_TEMPERATURE = 1e-6


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How to continue a prompt; the names and meanings are those of `transformers.generate`.

    `max_new_tokens` is the length of the answer in tokens, its end included. By default the most
    probable token is taken at each step. `do_sample` draws it instead, after dividing the logits by
    `temperature` and keeping the `top_k` most probable tokens (0: all), then the fewest whose
    probabilities reach `top_p`. `num_beams` above 1 searches for the text with the largest
    log-probability / length ** `length_penalty`; `early_stopping` says when a search ends: True, as
    soon as there are `num_beams` finished texts; False, when no beam of the present length would
    improve on them; "never", when none of any length can. `no_repeat_ngram_size` n above 0 lets no
    run of n tokens come twice, the prompt's among them; with `no_repeat_in_prompt=False`, which
    transformers lacks, only new tokens count, as in the LoRA paper's decoder (microsoft/LoRA,
    gpt2_beam.py): what the prompt says may then be said.

    `eos_token_ids` end a text (None: the model's own; (): nothing does), `pad_token_id` fills what
    comes after (None: the model's own). `num_return` texts are given for each prompt: the best of
    the beams, or as many samples.

    `RequestError` for a value out of range, or one that would do nothing.

    >>> Decoding(32, num_beams=4, length_penalty=0.8).num_beams
    4
    """

    max_new_tokens: int = dataclasses.field(metadata={"low": 1, "high": MOST})
    _: dataclasses.KW_ONLY
    num_beams: int = setting(1, low=1, high=MOST)
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = setting(0, low=0)
    top_p: float = setting(1.0, above=0.0, high=1.0)
    length_penalty: float = setting(1.0)
    no_repeat_ngram_size: int = setting(0, low=0)
    no_repeat_in_prompt: bool = True
    early_stopping: bool | str = False
    eos_token_ids: tuple[int, ...] | None = None
    pad_token_id: int | None = setting(None, low=0)
    num_return: int = setting(1, low=1, high=MOST)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if field.name not in ("early_stopping", "eos_token_ids"):
                value = check_range(field.name, getattr(self, field.name), setting_of(field))
                object.__setattr__(self, field.name, value)
        if not (self.no_repeat_in_prompt or self.no_repeat_ngram_size):
            raise RequestError(
                "no_repeat_in_prompt=False does nothing without no_repeat_ngram_size; set both"
            )
        if not isinstance(self.early_stopping, bool) and self.early_stopping != NEVER:
            raise RequestError(
                f"early_stopping={self.early_stopping!r}; choose True, False or {NEVER!r}"
            )
        if not np.float32(self.temperature) >= LOWEST_TEMPERATURE:
            raise RequestError(
                f"temperature={self.temperature!r} must be above 1e-6; leave do_sample out for the "
                "most probable token"
            )
        self._check_lengths()
        self._check_ids()
        self._check_use()

    def _check_lengths(self):
        if not np.all(np.isfinite(self.divisors()) & (self.divisors() > 0)):
            raise RequestError(
                f"length_penalty={self.length_penalty!r} is beyond float32 at max_new_tokens="
                f"{self.max_new_tokens}; usual values are between -2 and 2"
            )

    def _check_ids(self):
        ids = self.eos_token_ids
        if isinstance(ids, int) and not isinstance(ids, bool):
            ids = (ids,)
        if ids is not None:
            if isinstance(ids, str) or not hasattr(ids, "__iter__"):
                raise RequestError(f"eos_token_ids={ids!r}; give a tuple of token ids")
            id_ = Setting(kind="whole", required=True, low=0)
            ids = tuple(dict.fromkeys(check_range("eos_token_ids", one, id_) for one in ids))
        object.__setattr__(self, "eos_token_ids", ids)  # lists of a config, hashable from here on

    def _check_use(self):
        """A setting without effect is a mistake: it was written to change the text."""
        off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        if not self.do_sample:
            self._must_be(off, "acts only with do_sample=True")
        elif self.num_beams > 1:
            raise RequestError(
                f"do_sample=True with num_beams={self.num_beams}: draw samples (num_beams=1) or "
                "search for the best text (do_sample=False)"
            )
        if self.num_beams == 1:
            off = {"length_penalty": 1.0, "early_stopping": False}
            self._must_be(off, "acts only with num_beams above 1")
            if self.num_return > 1 and not self.do_sample:
                raise RequestError(
                    f"num_return={self.num_return} needs do_sample=True or as many num_beams: "
                    "there is one most probable token at each step"
                )
        elif self.num_return > self.num_beams:
            raise RequestError(
                f"num_return={self.num_return} is more than num_beams={self.num_beams}; a search "
                "keeps one text a beam"
            )

    def _must_be(self, defaults: dict[str, Any], why: str):
        for name, default in defaults.items():
            if (value := getattr(self, name)) != default:
                raise RequestError(f"{name}={value!r} {why}; leave it out, or change that")

    def divisors(self) -> np.ndarray:
        """(max_new_tokens,) float32: what divides the score of a text of 1, 2, … tokens."""
        lengths = np.arange(1, self.max_new_tokens + 1, dtype=np.float64)
        with np.errstate(over="ignore"):
            return (lengths**self.length_penalty).astype(np.float32)
