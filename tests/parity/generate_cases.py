"""What is generated in `test_generate_parity.py`: read by torch's side and by ours.

`prompts` names the batch: "full", or "left" (padded on the left). `eos` are token ids; all else are
arguments of `transformers.generate` and fields of `Decoding` alike.
"""

from __future__ import annotations

NUM_NEW = 14
PAD = 3
# Tokens that these random models come to soon, in some of the rows.
ONE, TWO = "one", "two"
EOS = {"llama": {ONE: (70,), TWO: (70, 27)}, "gpt2": {ONE: (69,), TWO: (69, 37)}}

GREEDY = {
    "greedy": {"prompts": "full"},
    "greedy, padded, one end": {"prompts": "left", "eos": ONE},
    "greedy, padded, two ends": {"prompts": "left", "eos": TWO},
    "greedy, no 2 twice": {"prompts": "left", "eos": ONE, "no_repeat_ngram_size": 2},
    "greedy, no 3 twice": {"prompts": "full", "no_repeat_ngram_size": 3},
    "greedy, no 1 twice": {"prompts": "left", "no_repeat_ngram_size": 1},
}
BEAMS = {
    "2 beams": {"num_beams": 2, "prompts": "full"},
    "2 beams, ends": {"num_beams": 2, "eos": ONE},
    "4 beams, penalty 0.8": {"num_beams": 4, "eos": ONE, "length_penalty": 0.8},
    "4 beams": {"num_beams": 4, "eos": ONE},
    "4 beams, penalty 2": {"num_beams": 4, "eos": ONE, "length_penalty": 2.0},
    "4 beams, penalty -1": {"num_beams": 4, "eos": ONE, "length_penalty": -1.0},
    "4 beams, penalty 0": {"num_beams": 4, "eos": ONE, "length_penalty": 0.0},
    "4 beams, early": {"num_beams": 4, "eos": ONE, "early_stopping": True},
    "4 beams, early, penalty 2": {
        "num_beams": 4, "eos": ONE, "early_stopping": True, "length_penalty": 2.0,
    },
    "4 beams, never": {"num_beams": 4, "eos": ONE, "early_stopping": "never"},
    "4 beams, never, penalty 2": {
        "num_beams": 4, "eos": ONE, "early_stopping": "never", "length_penalty": 2.0,
    },
    "4 beams, never, penalty -1": {
        "num_beams": 4, "eos": ONE, "early_stopping": "never", "length_penalty": -1.0,
    },
    "4 beams, no end, full": {"num_beams": 4, "prompts": "full"},
    "4 beams, two ends": {"num_beams": 4, "eos": TWO},
    "4 beams, two ends, early": {"num_beams": 4, "eos": TWO, "early_stopping": True},
    "4 beams, the best 3": {"num_beams": 4, "eos": TWO, "num_return": 3},
    "4 beams, no 3 twice": {"num_beams": 4, "eos": ONE, "no_repeat_ngram_size": 3},
    "10 beams, penalty 0.8, no 4 twice": {
        "num_beams": 10, "eos": ONE, "length_penalty": 0.8, "no_repeat_ngram_size": 4,
    },
    "10 beams, two ends, no 2 twice": {
        "num_beams": 10, "eos": TWO, "length_penalty": 2.0, "no_repeat_ngram_size": 2,
    },
}  # fmt: skip
CASES = {name: {"prompts": "left", **case} for name, case in {**GREEDY, **BEAMS}.items()}
MODELS = ("llama", "gpt2")
