"""Text generation: greedy, sampled and by beams, with a key-value cache, compiled once a shape.

Called, the package is its function `generate_text`: `lora_jax.generate(model, params, prompts)`.
"""

from lora_jax._public import call_as, renamed
from lora_jax.generate.chat import chat_prompt as chat_prompt
from lora_jax.generate.run import Generated as Generated
from lora_jax.generate.run import compile_first as compile_first
from lora_jax.generate.run import generate_tokens as generate_tokens
from lora_jax.generate.settings import Decoding as Decoding
from lora_jax.generate.text import answer_rows as answer_rows
from lora_jax.generate.text import decode_texts as decode_texts
from lora_jax.generate.text import encode_prompts as encode_prompts
from lora_jax.generate.text import generate_text as generate_text
from lora_jax.generate.text import pad_left as pad_left

__getattr__ = renamed(
    __name__,
    generate=("lora_jax.generate.run.generate_tokens", "lora_jax.generate.generate_tokens"),
)
call_as(__name__, "generate_text")
