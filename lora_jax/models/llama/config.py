"""The sizes and constants of Llama and its relatives, read from a `config.json` field by field."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from lora_jax.models.config_fields import Activation, Depth, Fields, Flag, Positive, Size

MODEL_TYPES = ("llama", "mistral", "qwen2")
# What transformers takes where a config is silent.
_KEY_HEADS = {"mistral": 8, "qwen2": 32}
_MISTRAL_WINDOW = 4096
_ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The sizes and constants of one model; field names are those of its `config.json`.

    `rope_scaling` is None or {"rope_type", …} (see `rope_frequencies`), as sorted pairs so that the
    config is hashable; `scan_layers` stacks the layers' parameters and is ours alone.
    """

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: Size
    rms_norm_eps: Positive = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: tuple[tuple[str, Any], ...] | None = None
    hidden_act: Activation = "silu"
    tie_word_embeddings: Flag = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: Flag = False
    sliding_window: int | None = None
    initializer_range: Positive = 0.02
    model_type: str = "llama"
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    scan_layers: bool = False

    @classmethod
    def from_json(cls, raw: dict[str, Any], place: str) -> LlamaConfig:
        """Checks the fields of a `config.json`; `RequestError` names the field and `place`."""
        fields = Fields(raw, place)
        model_type = fields.choice("model_type", MODEL_TYPES)
        hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
        if raw.get("head_dim") is None and hidden % heads:
            raise fields.error(
                "hidden_size", hidden, f"a multiple of num_attention_heads = {heads}"
            )
        key_heads = fields.integer("num_key_value_heads", _KEY_HEADS.get(model_type, heads))
        if heads % key_heads:
            wanted = f"a divisor of num_attention_heads = {heads}"
            raise fields.error("num_key_value_heads", key_heads, wanted)
        head_dim = fields.integer("head_dim", hidden // heads)
        if head_dim % 2:
            raise fields.error("head_dim", head_dim, "even: rotary positions turn pairs")
        theta, scaling = _read_rope(fields)
        has_bias = fields.choice("attention_bias", [False, True], False)
        return fields.config(
            cls,
            num_key_value_heads=key_heads,
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=scaling,
            qkv_bias=has_bias or model_type == "qwen2",
            o_bias=has_bias and model_type == "llama",
            sliding_window=_read_window(fields, model_type),
            model_type=model_type,
            **fields.special_tokens(fields.integer("vocab_size")),
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the object that transformers (4 and 5) and `from_json` read."""
        raw = dataclasses.asdict(self)
        for name in ("qkv_bias", "o_bias", "scan_layers"):
            del raw[name]
        if self.model_type == "llama":
            raw["attention_bias"] = self.qkv_bias
        if self.model_type == "qwen2":
            raw["use_sliding_window"] = False
        scaling = dict(self.rope_scaling) if self.rope_scaling else None
        rope = {"rope_theta": self.rope_theta, "rope_type": "default", **(scaling or {})}
        return {
            **raw,
            "architectures": [f"{class_name(self)}ForCausalLM"],
            "rope_scaling": scaling,
            "rope_parameters": rope,
        }


def _read_rope(fields: Fields) -> tuple[float, tuple[tuple[str, Any], ...] | None]:
    """`(theta, scaling)`: transformers 4 has two fields for it, transformers 5 one."""
    both = fields.mapping("rope_scaling") or {}
    newer = fields.mapping("rope_parameters") or {}
    rope = {**both, **newer}
    inner = fields.inner("rope_parameters" if newer else "rope_scaling", rope)
    theta = fields.positive("rope_theta", LlamaConfig.rope_theta)
    theta = inner.positive("rope_theta", theta)
    # Rotating a part of each head alone is another model.
    for part in (fields, inner):
        part.choice("partial_rotary_factor", [1.0, 1], 1.0)
    kind = inner.choice("rope_type", _ROPE_NUMBERS, rope.get("type", "default"))
    if kind == "default":
        return theta, None
    # The last one counts tokens: transformers warns of anything but an integer.
    numbers: dict[str, Any] = {
        name: inner.integer(name) if name.startswith("original") else inner.positive(name)
        for name in _ROPE_NUMBERS[kind]
    }
    if kind == "llama3" and numbers["high_freq_factor"] <= numbers["low_freq_factor"]:
        wanted = f"above low_freq_factor = {numbers['low_freq_factor']}"
        raise inner.error("high_freq_factor", numbers["high_freq_factor"], wanted)
    return theta, (("rope_type", kind), *numbers.items())


def _read_window(fields: Fields, model_type: str) -> int | None:
    if model_type == "llama":
        return None
    if model_type == "qwen2":
        # With it, only some of the layers have a window.
        fields.only(use_sliding_window=False)
        return None
    default = None if "sliding_window" in fields else _MISTRAL_WINDOW
    return fields.integer("sliding_window", default, maximum=2**31 - 1)


def class_name(config: LlamaConfig) -> str:
    """What transformers' classes of this model begin with."""
    return {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[config.model_type]


def llama_aliases(config: LlamaConfig) -> Mapping[str, str]:
    """Regexes of parameter paths by short name."""
    layer = "layers" if config.scan_layers else r"layers/\d+"
    of_attention = {name: rf"{layer}/attention/{name}/kernel" for name in "qkvo"}
    of_mlp = {name: rf"{layer}/mlp/{name}/kernel" for name in ("gate", "up", "down")}
    return {
        **of_attention,
        **of_mlp,
        "embed": "embed/embedding",
        "head": "head/kernel",
        "all-linear": rf"{layer}/(attention/[qkvo]|mlp/(gate|up|down))/kernel",
    }
